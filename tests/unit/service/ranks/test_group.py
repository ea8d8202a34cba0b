"""The leader's view of a group: it forms when all have loaded, breaks when one is lost, and forms again."""

import asyncio
from collections.abc import Callable

import pytest

from sps2.internal.v1 import engine_pb2
from sps2_service.errors import Unavailable
from sps2_service.ranks import group as group_module
from sps2_service.ranks.group import GroupLeader, GroupState, Member

Event = engine_pb2.EngineEvent


class Recorder:
    """A coordinator that writes down what it is told."""

    def __init__(self) -> None:
        self.formed: list[int] = []
        self.broken: list[Unavailable] = []
        self.events: list[tuple[int, str | None]] = []

    def on_formed(self, epoch: int, ranks: list[engine_pb2.EngineLoaded]) -> None:
        assert ranks
        self.formed.append(epoch)

    def on_broken(self, error: Unavailable) -> None:
        self.broken.append(error)

    def on_event(self, rank: int, event: Event) -> None:
        self.events.append((rank, event.WhichOneof("event")))


class Group:
    """A leader with fake ranks: what each was commanded is written down, what it reports is up to the test."""

    def __init__(self, size: int) -> None:
        self.recorder = Recorder()
        self.leader = GroupLeader("decode-0", size, self._draw_epoch, self.recorder, lambda: None)
        self.commands: dict[int, list[engine_pb2.EngineCommand]] = {}
        self.members: dict[int, Member] = {}

    async def _draw_epoch(self, previous: int) -> int:
        return previous + 10

    def join(self, rank: int) -> None:
        commands: list[engine_pb2.EngineCommand] = []
        self.commands[rank] = commands

        def send(command: engine_pb2.EngineCommand) -> None:
            commands.append(engine_pb2.EngineCommand.FromString(command.SerializeToString()))

        self.members[rank] = self.leader.join(rank, send)

    def report(self, rank: int, event: Event) -> None:
        self.leader.on_event(rank, event, self.members[rank])

    def load(self, rank: int) -> None:
        self.report(rank, Event(loaded=engine_pb2.EngineLoaded(kv_blocks_total=4)))

    def kinds(self, rank: int) -> list[str | None]:
        return [command.WhichOneof("command") for command in self.commands[rank]]

    async def form(self) -> None:
        """Plays the ranks' part of forming."""
        await until(lambda: self.leader.state is GroupState.FORMING)
        epoch = self.leader.epoch
        self.report(0, Event(epoch=epoch, store_ready=engine_pb2.StoreReady(address="127.0.0.1:1")))
        for rank in self.members:
            self.report(rank, Event(epoch=epoch, group_formed=engine_pb2.GroupFormed()))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - gives the leader's own task its turn, and knows no event of it
            await asyncio.sleep(0)


@pytest.fixture
async def formed(monkeypatch: pytest.MonkeyPatch) -> Group:
    monkeypatch.setattr(group_module, "REFORM_PAUSE_S", 0.0)
    monkeypatch.setattr(group_module, "BLAME_PAUSE_S", 0.01)
    group = Group(2)
    for rank in (0, 1):
        group.join(rank)
        group.load(rank)
    await group.form()
    return group


async def test_forms_when_every_rank_has_joined_and_loaded(formed: Group) -> None:
    assert formed.leader.state is GroupState.FORMED
    assert formed.recorder.formed == [10]
    assert formed.kinds(0) == formed.kinds(1) == ["form_group"]
    first, second = formed.commands[0][0], formed.commands[1][0]
    assert (first.epoch, first.form_group.store_address) == (10, "")
    assert (second.form_group.rank, second.form_group.store_address) == (1, "127.0.0.1:1")


async def test_waits_for_the_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(3)
    group.join(0)
    group.load(0)
    group.join(1)
    assert group.leader.state is GroupState.WAITING
    assert group.leader.missing == "rank 2 absent, rank 1 loading"


async def test_a_lost_engine_breaks_the_epoch_and_the_next_forms(formed: Group) -> None:
    formed.leader.lose(1, "the engine of decode-0/1 was killed by signal SIGKILL", formed.members[1])
    (error,) = formed.recorder.broken
    assert error.reason == "RANK_DIED"
    assert error.metadata["component"] == "decode-0/1"
    assert "SIGKILL" in error.message
    assert formed.kinds(0)[-1] == "abort_group"
    formed.load(1)
    await formed.form()
    assert formed.recorder.formed == [10, 20]


async def test_a_supervisor_that_left_may_come_back(formed: Group) -> None:
    formed.leader.leave(1, "gone", formed.members[1])
    assert len(formed.recorder.broken) == 1
    formed.join(1)
    formed.load(1)
    await formed.form()
    assert formed.recorder.formed == [10, 20]


async def test_a_rank_that_joins_again_replaces_its_former_self(formed: Group) -> None:
    former = formed.members[1]
    formed.join(1)
    assert len(formed.recorder.broken) == 1
    formed.leader.leave(1, "the old stream ends late", former)
    formed.load(1)
    await formed.form()
    assert formed.recorder.formed == [10, 20]
    assert len(formed.recorder.broken) == 1


async def test_a_failed_collective_breaks_once(formed: Group) -> None:
    failed = Event(epoch=10, group_failed=engine_pb2.GroupFailed(reason="peer closed"))
    formed.report(0, failed)
    formed.report(1, failed)
    await until(lambda: bool(formed.recorder.broken))
    assert formed.recorder.broken[0].metadata["component"] == "decode-0/0"
    await formed.form()
    assert formed.recorder.formed == [10, 20]


async def test_a_survivor_that_reports_first_is_not_blamed(formed: Group) -> None:
    formed.report(0, Event(epoch=10, group_failed=engine_pb2.GroupFailed(reason="peer closed")))
    assert formed.recorder.broken == []
    formed.leader.lose(1, "the engine of decode-0/1 was killed by signal SIGKILL", formed.members[1])
    (error,) = formed.recorder.broken
    assert error.metadata["component"] == "decode-0/1"
    formed.load(1)
    await formed.form()
    await asyncio.sleep(0.02)  # the suspicion of epoch 10 must not end epoch 20
    assert formed.leader.state is GroupState.FORMED
    assert len(formed.recorder.broken) == 1


async def test_events_of_an_older_epoch_are_dropped(formed: Group) -> None:
    formed.report(0, Event(epoch=9, row_received=engine_pb2.RowReceived(row=1)))
    assert formed.recorder.events == []
    formed.report(0, Event(epoch=10, row_received=engine_pb2.RowReceived(row=1)))
    assert formed.recorder.events == [(0, "row_received")]


async def test_a_rank_that_does_not_form_breaks_the_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_module, "FORM_TIMEOUT_S", 0.01)
    monkeypatch.setattr(group_module, "REFORM_PAUSE_S", 60.0)
    group = Group(2)
    for rank in (0, 1):
        group.join(rank)
        group.load(rank)
    await until(lambda: len(group.recorder.broken) == 1)
    assert "did not form" in group.recorder.broken[0].message
    group.leader.close()
