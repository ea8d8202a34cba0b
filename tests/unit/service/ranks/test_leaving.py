"""Leader and followers over real gRPC: nobody leaves before the group has drained, and then everybody does."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from sps2.internal.v1 import engine_pb2, group_service_pb2
from sps2.internal.v1.group_service_pb2_grpc import GroupServiceStub
from sps2_service.channel import open_channel
from sps2_service.errors import Unavailable
from sps2_service.ranks.follower import Follower
from sps2_service.ranks.group import GroupLeader
from sps2_service.ranks.group_servicer import GroupServicer
from sps2_service.server import ServiceServer

TIMEOUT_S = 10.0
SERVICE = group_service_pb2.DESCRIPTOR.services_by_name["GroupService"]


class Nobody:
    """A coordinator without work, an engine without a process, a worker without a lease."""

    def on_formed(self, epoch: int, ranks: list[engine_pb2.EngineLoaded]) -> None:
        raise AssertionError("no group forms here")

    def on_broken(self, error: Unavailable) -> None:
        raise AssertionError("no group breaks here")

    def on_event(self, rank: int, event: engine_pb2.EngineEvent) -> None:
        raise AssertionError("nobody reports here")

    def send(self, command: engine_pb2.EngineCommand) -> None:
        raise AssertionError("nobody is commanded here")

    def lend(self, _number: int) -> None:
        raise AssertionError("nobody renews here")

    def on_carried(self, _number: int, _status: int) -> None:
        raise AssertionError("nobody renews here")


class Group:
    """A leader that listens, and one follower."""

    def __init__(self) -> None:
        self.why: list[str] = []
        self.asked = asyncio.Event()
        self.dismissed = asyncio.Event()
        self.address = ""
        self.leader = GroupLeader("decode-0", 2, self._draw_epoch, Nobody(), lambda: None)
        self.leader.on_leave = self._on_leave
        self.server = ServiceServer()
        self.server.add(GroupServicer(self.leader, "hash", drain_budget_s=7), SERVICE)

    async def _draw_epoch(self, previous: int) -> int:
        return previous + 1

    def _on_leave(self, why: str) -> None:
        self.why.append(why)
        self.asked.set()

    def follower(self) -> Follower:
        hello = group_service_pb2.FollowerHello(
            group="decode-0", rank=1, group_size=2, model_hash="hash", tensor_ranks=1
        )
        nobody: Any = Nobody()
        made = Follower(hello, self.address, "decode-0/1", nobody, self.dismissed.set, None)
        made.attach(nobody)
        return made

    async def joined(self) -> None:
        await until(lambda: 1 in self.leader.members)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 - it comes over the wire
            await asyncio.sleep(0.005)


@pytest.fixture
async def group() -> AsyncIterator[Group]:
    made = Group()
    made.address = await made.server.start("127.0.0.1:0")
    yield made
    await made.server.stop(0)


@asynccontextmanager
async def running(follower: Follower) -> AsyncIterator[Follower]:
    task = asyncio.create_task(follower.run())
    try:
        yield follower
    finally:
        assert not task.done(), "its supervisor decides when it ends"
        task.cancel()
        await asyncio.wait([task])


async def test_a_follower_that_is_told_to_end_waits_until_it_is_dismissed(group: Group) -> None:
    async with running(group.follower()) as follower, asyncio.timeout(TIMEOUT_S):
        await group.joined()
        leaving = asyncio.create_task(follower.leave())
        await group.asked.wait()
        assert group.why == ["rank 1 was told to end"]
        assert not leaving.done()
        assert 1 in group.leader.members, "it works on while the group drains"
        group.leader.dismiss()
        await leaving


async def test_a_follower_leaves_with_its_group_untold(group: Group) -> None:
    async with running(group.follower()) as follower, asyncio.timeout(TIMEOUT_S):
        await group.joined()
        group.leader.dismiss()
        await group.dismissed.wait()
        await follower.leave()
        await until(lambda: not group.leader.members)  # and the group was not broken by it


async def test_who_joins_a_group_that_has_drained_is_sent_away(group: Group) -> None:
    group.leader.dismiss()
    async with running(group.follower()), asyncio.timeout(TIMEOUT_S):
        await group.dismissed.wait()


async def test_without_a_leader_there_is_nobody_to_wait_for(group: Group) -> None:
    async with running(group.follower()) as follower, asyncio.timeout(TIMEOUT_S):
        await group.joined()
        leaving = asyncio.create_task(follower.leave())
        await group.asked.wait()
        await group.server.stop(0)  # it dies while it drains
        await leaving
    async with running(group.follower()) as late, asyncio.timeout(TIMEOUT_S):
        await late.leave()


async def test_an_operator_drains_the_group_that_is_meant(group: Group) -> None:
    async with open_channel(group.address) as channel:
        stub: Any = GroupServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.DrainGroup(group_service_pb2.DrainGroupRequest(group="decode-1"), timeout=TIMEOUT_S)
        assert caught.value.code() is grpc.StatusCode.ABORTED
        assert not group.why
        for _ in range(2):
            request = group_service_pb2.DrainGroupRequest(group="decode-0")
            assert (await stub.DrainGroup(request, timeout=TIMEOUT_S)).budget_s == 7
    assert group.why == ["an operator asked for it"] * 2
