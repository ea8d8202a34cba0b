"""A supervisor and its engine: events, commands, death in every form, and that nothing outlives it."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from sps2.internal.v1 import engine_pb2
from sps2_service.ranks.engine_process import EngineProcess, EngineStartError, EngineWatch

QUICK = EngineWatch(silence_s=0.5, stuck_s=0.5, restart_pause_s=0.0, check_s=0.05, exit_s=5.0)


class Watched:
    """An engine process with what it reported."""

    def __init__(self, mode: str) -> None:
        self.events: asyncio.Queue[engine_pb2.EngineEvent] = asyncio.Queue()
        self.lost: asyncio.Queue[str] = asyncio.Queue()
        self.engine = EngineProcess(
            "decode-0/1",
            "support.stand_in_engine",
            lambda fd: [mode, str(fd)],
            self.events.put_nowait,
            self.lost.put_nowait,
            QUICK,
        )

    async def next_event(self, kind: str) -> engine_pb2.EngineEvent:
        async with asyncio.timeout(20):
            while True:
                event = await self.events.get()
                if event.WhichOneof("event") == kind:
                    return event

    async def next_loss(self) -> str:
        async with asyncio.timeout(20):
            return await self.lost.get()

    @property
    def pid(self) -> int:
        process = self.engine._process
        assert process is not None
        return process.pid


@asynccontextmanager
async def running(mode: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Watched]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["tests", os.environ.get("PYTHONPATH", "")]))
    watched = Watched(mode)
    task = asyncio.create_task(watched.engine.run())
    try:
        yield watched
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_events_come_out_and_commands_go_in(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running("ready", monkeypatch) as watched:
        assert (await watched.next_event("loaded")).loaded.device == "cpu"
        watched.engine.send(engine_pb2.EngineCommand(epoch=5, form_group=engine_pb2.FormGroup(world_size=1)))
        assert (await watched.next_event("group_formed")).epoch == 5
        pid = watched.pid
    with pytest.raises(ProcessLookupError):  # it has ended with its supervisor's task
        os.kill(pid, 0)


async def test_a_killed_engine_is_told_of_and_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running("ready", monkeypatch) as watched:
        await watched.next_event("heartbeat")
        first = watched.pid
        os.kill(first, signal.SIGKILL)
        assert await watched.next_loss() == "the engine of decode-0/1 was killed by signal SIGKILL"
        await watched.next_event("loaded")
        assert watched.pid != first


async def test_what_it_said_last_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running("crash", monkeypatch) as watched:
        await watched.next_event("loaded")
        assert await watched.next_loss() == "the engine of decode-0/1 exited with status 7"


@pytest.mark.parametrize(("mode", "words"), [("mute", "no sign of life"), ("busy", "busy without progress")])
async def test_a_silent_or_stuck_engine_is_killed(
    mode: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(mode, monkeypatch) as watched:
        assert words in await watched.next_loss()


async def test_a_stopped_engine_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running("ready", monkeypatch) as watched:
        await watched.next_event("heartbeat")
        os.kill(watched.pid, signal.SIGSTOP)
        assert "no sign of life" in await watched.next_loss()


async def test_a_bad_checkpoint_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched("bad")
    monkeypatch.setenv("PYTHONPATH", "tests")
    with pytest.raises(EngineStartError, match="decode-0/1: tensor 'x' is missing; copy the folder again"):
        await asyncio.wait_for(watched.engine.run(), 20)
