"""The supervisor's view of its engine: a child process behind a Unix socket, started again when it ends.

Knows nothing of groups or requests: events come out, commands go in.
"""

import asyncio
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import structlog

from sps2.internal.v1 import engine_pb2
from sps2_service.process import tied_command
from sps2_service.run import ExpectedEndError

_LENGTH = struct.Struct("<I")
EXIT_BAD_CHECKPOINT = 3
"""The engine's exit status that says: the model folder is at fault, starting again does not help."""

log = structlog.get_logger(__name__)


class EngineStartError(ExpectedEndError):
    """The engine ended in a way that starting it again will not change."""


@dataclass(frozen=True)
class EngineWatch:
    """When an engine counts as dead or stuck, and how it is started again."""

    silence_s: float = 5.0
    """Heartbeats (twice a second) missing for this long: stopped or wedged; it is killed."""
    stuck_s: float = 600.0
    """Busy without a step or layer done for this long: stuck; it is killed."""
    restart_pause_s: float = 0.5
    """Pause before it is started again."""
    check_s: float = 0.5
    """Time between looks."""
    exit_s: float = 5.0
    """What a clean exit may take before the engine is killed."""


class EngineProcess:
    """Runs one engine for the life of the supervisor.

    `on_event` gets each event, `on_lost` a sentence each time the engine has ended unasked. Both are called on
    the event loop and must not block.
    """

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Callable[[int], list[str]],
        on_event: Callable[[engine_pb2.EngineEvent], None],
        on_lost: Callable[[str], None],
        watch: EngineWatch = EngineWatch(),
    ) -> None:
        """`name` is the worker's id; `module` what `python -m` runs; `arguments` are made for a socket's fd."""
        self._name = name
        self._module = module
        self._arguments = arguments
        self._on_event = on_event
        self._on_lost = on_lost
        self._watch = watch
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._last_beat = 0.0
        self._last_progress = 0.0
        self._steps_done = -1
        self._killed_for = ""
        self._load_failure = ""
        self.heartbeat = engine_pb2.Heartbeat()
        """The last one."""
        self.num_restarts = 0
        """Engines that have ended unasked."""

    def send(self, command: engine_pb2.EngineCommand) -> None:
        """Queues a command for the engine; one that is down misses it, and `on_lost` tells of that."""
        if self._writer is not None and not self._writer.is_closing():
            body = command.SerializeToString()
            self._writer.write(_LENGTH.pack(len(body)) + body)

    async def run(self) -> None:
        """Starts the engine, and again whenever it ends; runs until cancelled.

        Raises:
            EngineStartError: the model folder is at fault.
        """
        try:
            while True:
                status = await self._run_once()
                reason = self._describe_end(status)
                log.warning("engine lost", reason=reason)
                self.num_restarts += 1
                self._on_lost(reason)
                if status == EXIT_BAD_CHECKPOINT:
                    raise EngineStartError(reason)
                await asyncio.sleep(self._watch.restart_pause_s)
        finally:
            await self._end()

    async def _run_once(self) -> int:
        """One life of the engine; its exit status."""
        ours, theirs = socket.socketpair()
        self._killed_for = ""
        self._steps_done, self.heartbeat = -1, engine_pb2.Heartbeat()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                *tied_command([sys.executable, "-P", "-m", self._module, *self._arguments(theirs.fileno())]),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
            )
        reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        self._last_beat = self._last_progress = time.monotonic()
        reading = asyncio.create_task(self._read(reader), name="engine-events")
        watching = asyncio.create_task(self._watch_over(), name="engine-watch")
        try:
            status = await self._process.wait()
            with suppress(asyncio.IncompleteReadError):  # what it said last is still in the socket
                await reading
            return status
        finally:
            for task in (reading, watching):
                task.cancel()
            self._writer.close()
            self._writer = None

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while True:
            try:
                head = await reader.readexactly(_LENGTH.size)
                body = await reader.readexactly(_LENGTH.unpack(head)[0])
            except (asyncio.IncompleteReadError, ConnectionResetError):
                return
            event = engine_pb2.EngineEvent.FromString(body)
            if event.HasField("heartbeat"):
                self._note_heartbeat(event.heartbeat)
            else:
                self._last_progress = time.monotonic()
                self._load_failure = event.load_failed.reason or self._load_failure
            self._on_event(event)

    def _note_heartbeat(self, heartbeat: engine_pb2.Heartbeat) -> None:
        now = time.monotonic()
        self._last_beat = now
        if not heartbeat.busy or heartbeat.steps_done != self._steps_done:
            self._last_progress = now
        self._steps_done = heartbeat.steps_done
        self.heartbeat = heartbeat

    async def _watch_over(self) -> None:
        """Kills an engine that is silent or stuck; its end is then handled like any other."""
        while True:
            await asyncio.sleep(self._watch.check_s)
            now = time.monotonic()
            if self._steps_done >= 0 and now - self._last_beat > self._watch.silence_s:
                self._kill(f"gave no sign of life for {self._watch.silence_s:g} s")
            elif self.heartbeat.busy and now - self._last_progress > self._watch.stuck_s:
                self._kill(f"was busy without progress for {self._watch.stuck_s:g} s")

    def _kill(self, reason: str) -> None:
        self._killed_for = reason
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    def _describe_end(self, status: int) -> str:
        if self._load_failure:
            return f"{self._name}: {self._load_failure}"
        if self._killed_for:
            return f"the engine of {self._name} {self._killed_for} and was killed"
        if status < 0:
            return f"the engine of {self._name} was killed by signal {signal.Signals(-status).name}"
        return f"the engine of {self._name} exited with status {status}"

    async def _end(self) -> None:
        """Asks the engine to end, then makes it."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        self.send(engine_pb2.EngineCommand(shutdown=engine_pb2.Shutdown()))
        try:
            async with asyncio.timeout(self._watch.exit_s):
                await process.wait()
        except TimeoutError:
            log.warning("the engine does not end, it is killed")
            process.kill()
            await process.wait()
