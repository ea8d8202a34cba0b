"""The engine's main loop around the forming of a group: what ends an epoch may come before it stands."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch

from sps2.internal.v1 import engine_pb2
from sps2_engine.rank_groups import RankGroups
from sps2_engine.runtime.host import EngineHost
from support.waiting import wait_until

pytestmark = pytest.mark.multiprocess

Command = engine_pb2.EngineCommand
Event = engine_pb2.EngineEvent
SOON_S = 10.0
"""Far under the 30 s that forming may take, and enough for a busy machine."""


class FakeLink:
    """Takes events; commands come from the test."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.command: Callable[[Command], None] = lambda _: None

    def start(self, on_command: Callable[[Command], None]) -> None:
        self.command = on_command

    def send(self, event: Event) -> None:
        self.events.append(event)

    def wait_for(self, kind: str, epoch: int = 0, timeout: float = SOON_S) -> Event:
        """The first event of this kind and epoch."""

        def matching() -> list[Event]:
            return [one for one in self.events if one.HasField(kind) and one.epoch == epoch]  # type: ignore[arg-type]

        wait_until(lambda: bool(matching()), timeout=timeout)
        return matching()[0]


class FakeRole:
    """Joins groups and computes nothing."""

    steps_done = 0
    kv_blocks_used = 0
    kv_blocks_cached = 0
    exposed_s = 0.0
    exchanges_in_steps = False

    def __init__(self) -> None:
        self.bytes_posted: Counter[str] = Counter()
        self.sizes: list[tuple[int, int, int]] = []

    def load(self, progress: Callable[[float], None]) -> engine_pb2.EngineLoaded:
        progress(1.0)
        return engine_pb2.EngineLoaded()

    def join(self, groups: RankGroups, epoch: int) -> None:
        assert epoch > 0
        self.sizes.append((groups.everyone.size, groups.sequence.size, groups.tensor.size))

    def reset(self) -> None:
        """Holds nothing."""

    def notice(self, command: Command) -> None:
        """Waits for its turn."""

    def execute(self, command: Command) -> None:
        raise AssertionError(f"no command is for this role: {command}")


class Engine:
    """A host in a thread."""

    def __init__(self, tp: int = 1) -> None:
        self.link, self.role = FakeLink(), FakeRole()
        host = EngineHost(
            self.link,  # type: ignore[arg-type] # all that a host uses of one
            self.role,
            torch.device("cpu"),
            "127.0.0.1",
            timedelta(seconds=30),
            tp,
        )
        self.thread = threading.Thread(target=host.run, daemon=True)
        self.thread.start()
        self.link.wait_for("loaded")

    def form(self, epoch: int, rank: int, size: int, store_address: str = "") -> None:
        form = engine_pb2.FormGroup(rank=rank, world_size=size, store_address=store_address)
        self.link.command(Command(epoch=epoch, form_group=form))

    def abort(self, epoch: int) -> None:
        self.link.command(Command(epoch=epoch, abort_group=engine_pb2.AbortGroup(reason="a rank died")))

    def shut_down(self) -> None:
        self.link.command(Command(shutdown=engine_pb2.Shutdown()))
        self.thread.join(5.0)
        assert not self.thread.is_alive()


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    pair = [Engine(), Engine()]
    yield pair
    for engine in pair:
        engine.shut_down()


def form(engines: list[Engine], epoch: int) -> None:
    size = len(engines)
    engines[0].form(epoch, 0, size)
    address = engines[0].link.wait_for("store_ready", epoch).store_ready.address
    for rank in range(1, size):
        engines[rank].form(epoch, rank, size, address)
    for engine in engines:
        engine.link.wait_for("group_formed", epoch, timeout=10.0)


def test_groups_form_one_after_the_other(engines: list[Engine]) -> None:
    form(engines, 5)
    for engine in engines:
        engine.abort(5)
    form(engines, 6)
    assert [engine.role.sizes for engine in engines] == [[(2, 2, 1)] * 2] * 2


def test_a_group_forms_as_a_mesh() -> None:
    engines = [Engine(tp=2) for _ in range(4)]
    for epoch in (5, 6):
        form(engines, epoch)
    assert [engine.role.sizes for engine in engines] == [[(4, 2, 2)] * 2] * 4
    for engine in engines:
        engine.shut_down()


def test_an_abort_ends_the_wait_for_a_rank_that_does_not_come(engines: list[Engine]) -> None:
    engines[0].form(5, 0, 2)
    engines[0].link.wait_for("store_ready", 5)
    engines[0].abort(5)
    engines[0].link.wait_for("group_failed", 5)
    form(engines, 6)


def test_a_leader_that_dies_while_the_group_forms_frees_its_followers(engines: list[Engine]) -> None:
    engines[0].form(5, 0, 3)  # its third rank never comes
    address = engines[0].link.wait_for("store_ready", 5).store_ready.address
    engines[1].form(5, 1, 3, address)
    engines[0].abort(5)  # the store goes with it
    engines[1].link.wait_for("group_failed", 5)
    form(engines, 6)


def test_a_shutdown_does_not_wait_for_the_group_to_form() -> None:
    engine = Engine()
    engine.form(5, 0, 2)
    engine.link.wait_for("store_ready", 5)
    began = time.monotonic()
    engine.shut_down()
    assert time.monotonic() - began < SOON_S
