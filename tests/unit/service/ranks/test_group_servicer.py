"""Whom a leader lets into its group."""

from collections.abc import AsyncIterator

import pytest

from sps2.internal.v1 import engine_pb2, group_service_pb2
from sps2_service.errors import FailedPrecondition, InvalidArgument, ServiceError, Unavailable
from sps2_service.ranks.group import GroupLeader
from sps2_service.ranks.group_servicer import GroupServicer

HELLO = group_service_pb2.FollowerHello(
    group="prefill-0", rank=1, group_size=4, model_hash="hash", tensor_ranks=2
)


class Nobody:
    """A coordinator that is told nothing."""

    def on_formed(self, epoch: int, ranks: list[engine_pb2.EngineLoaded]) -> None:
        raise AssertionError("no group forms here")

    def on_broken(self, error: Unavailable) -> None:
        raise AssertionError("no group breaks here")

    def on_event(self, rank: int, event: engine_pb2.EngineEvent) -> None:
        raise AssertionError("nobody reports here")


async def draw_epoch(previous: int) -> int:
    return previous + 1


@pytest.mark.parametrize(
    ("changes", "error", "remedy"),
    [
        ({"group": "prefill-1"}, InvalidArgument, "check --group"),
        ({"rank": 4}, InvalidArgument, "check --group, --rank and --group-size"),
        ({"tensor_ranks": 1}, InvalidArgument, "splits layers 1 ways, rank 0 2: check --tp"),
        ({"model_hash": "other"}, FailedPrecondition, "check --model"),
    ],
)
async def test_a_rank_of_another_kind_is_turned_away(
    changes: dict[str, str | int], error: type[ServiceError], remedy: str
) -> None:
    leader = GroupLeader("prefill-0", 4, draw_epoch, Nobody(), lambda: None)
    hello = group_service_pb2.FollowerHello()
    hello.CopyFrom(HELLO)
    for name, value in changes.items():
        setattr(hello, name, value)

    async def requests() -> AsyncIterator[group_service_pb2.JoinGroupRequest]:
        yield group_service_pb2.JoinGroupRequest(hello=hello)

    servicer = GroupServicer(leader, "hash", tensor_ranks=2)
    with pytest.raises(error, match=remedy):
        await anext(servicer.JoinGroup(requests(), None))  # type: ignore[arg-type] # turned away before it is used
    assert leader.missing
