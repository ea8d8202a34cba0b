"""One container of a pod: its process under bubblewrap, started again whenever it ends, and stopped as declared.

The process is number 1 of a process table of its own, has the user, root and volumes of the manifest, and dies with
the node.
"""

import asyncio
import json
import os
import signal
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from support.kubelet.changes import Changes
from support.kubelet.environment import ManifestError, Object
from support.kubelet.image import Image
from support.kubelet.network import Sandbox
from support.kubelet.volumes import mounts

BACK_OFF_S = 1.0
"""Before a container is started again; the kubelet's grows from ten seconds on."""
KILLED = 128 + signal.SIGKILL


@dataclass(frozen=True)
class Exit:
    """The end of one process of a container."""

    pod: str
    container: str
    code: int
    """128 + the signal where one killed it."""
    asked: bool
    """It was told to stop."""
    killed: bool
    """By the kubelet, which lost patience."""
    stop_s: float
    """From the beginning of the stop, preStop included, to the end."""


@dataclass(frozen=True)
class Recipe:
    """All that it takes to start a process of a container."""

    name: str
    manifest: Object
    security: Object
    """securityContext of the pod, then of the container."""
    image: Image
    command: Sequence[str]
    env: Mapping[str, str]
    volumes: Mapping[str, Path]
    sandbox: Sandbox

    def bwrap(self, status_fd: int) -> list[str]:
        """The command on the node; bwrap writes its child's process id to `status_fd`."""
        folder = self.sandbox.folder
        user, group = self.security["runAsUser"], self.security["runAsGroup"]
        words = [*self.sandbox.enter, "bwrap", "--json-status-fd", str(status_fd)]
        words += ["--die-with-parent", "--new-session", "--as-pid-1", "--unshare-pid", "--unshare-user"]
        words += ["--uid", str(user), "--gid", str(group)]
        words += [*self.image.files, "--proc", "/proc", "--dev", "/dev", "--ro-bind", f"{folder}/sys", "/sys"]
        words += ["--bind", f"{folder}/shm", "/dev/shm"]  # noqa: S108 - where every container has it
        for name in ("hosts", "resolv.conf"):
            words += ["--ro-bind", f"{folder}/{name}", f"/etc/{name}"]
        words += mounts(self.manifest, self.volumes)
        for dropped in self.security.get("capabilities", {}).get("drop", []):
            words += ["--cap-drop", dropped]
        if self.security.get("readOnlyRootFilesystem"):
            words += ["--remount-ro", "/", "--remount-ro", "/dev"]
        words += ["--clearenv", *(word for pair in self.env.items() for word in ("--setenv", *pair))]
        return [*words, "--chdir", self.image.folder, "--", *self.command]


class Container:
    """A container, from its first process to its last."""

    def __init__(self, pod: str, recipe: Recipe, logs: Path, changes: Changes) -> None:
        """`logs`: a folder that exists; each process gets a file."""
        self.pod, self.name, self.manifest = pod, recipe.name, recipe.manifest
        self.exits: list[Exit] = []
        self.pid: int | None = None
        """Of the running process, as the node has it; None between two."""
        self._starting = False
        self._recipe, self._logs, self._changes = recipe, logs, changes
        self._stop_began: float | None = None
        self._killed = False

    @property
    def num_starts(self) -> int:
        """Processes so far."""
        return len(self.exits) + (self.pid is not None)

    @property
    def pre_stop_s(self) -> float:
        """Seconds of its preStop.

        Raises:
            ManifestError: a preStop of another kind.
        """
        match self.manifest.get("lifecycle", {}).get("preStop"):
            case None:
                return 0.0
            case {"sleep": {"seconds": seconds}}:
                return float(seconds)
            case other:
                raise ManifestError(f"preStop {other}: not known here")

    def log_path(self) -> Path:
        """Of the last process that was started."""
        return max(self._logs.glob(f"{self.name}.*.log"))

    async def run(self) -> Exit:
        """One process from its start to its end."""
        self._starting = True
        process, read_end = await self._start()
        async with _lines(read_end) as status:
            self.pid = (await _next(status)).get("child-pid")
            self._starting = False
            self._changes.tell()
            code = (await _next(status)).get("exit-code")
            bwrap_code = await process.wait()
        self.pid = None
        began, now = self._stop_began, asyncio.get_running_loop().time()
        ended = Exit(
            pod=self.pod,
            container=self.name,
            code=bwrap_code if code is None else code,
            asked=began is not None,
            killed=self._killed,
            stop_s=0.0 if began is None else now - began,
        )
        self.exits.append(ended)
        self._stop_began, self._killed = None, False
        self._changes.tell()
        return ended

    async def stop(self, grace_s: float) -> None:
        """preStop, SIGTERM, and SIGKILL `grace_s` after the beginning; returns when the process is gone."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace_s
        await self._changes.until(lambda: not self._starting, grace_s)
        if (pid := self.pid) is None:
            return
        if self._stop_began is not None:  # by a probe
            await self._changes.until(lambda: self.pid != pid, 2 * grace_s)
            return
        self._stop_began = loop.time()
        await asyncio.sleep(min(self.pre_stop_s, grace_s))
        self._signal(pid, signal.SIGTERM)
        try:
            await self._changes.until(lambda: self.pid != pid, deadline - loop.time())
        except TimeoutError:
            self._killed = True
            self._signal(pid, signal.SIGKILL)
            await self._changes.until(lambda: self.pid != pid, 30.0)

    def kill(self) -> None:
        """SIGKILL from elsewhere, as by the kernel when memory is short."""
        if self.pid is None:
            raise RuntimeError(f"{self.pod}/{self.name} does not run")
        self._signal(self.pid, signal.SIGKILL)

    async def _start(self) -> tuple[Process, int]:
        read_end, write_end = os.pipe()
        try:
            with (self._logs / f"{self.name}.{self.num_starts:03}.log").open("wb") as log:
                process = await asyncio.create_subprocess_exec(
                    *self._recipe.bwrap(write_end),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=asyncio.subprocess.STDOUT,
                    pass_fds=(write_end,),
                )
        finally:
            os.close(write_end)
        return process, read_end

    def _signal(self, pid: int, signum: signal.Signals) -> None:
        if self.pid == pid:
            os.kill(pid, signum)


@asynccontextmanager
async def _lines(read_end: int) -> AsyncIterator[asyncio.StreamReader]:
    """What comes through a pipe, line by line; the pipe is closed at the end."""
    reader = asyncio.StreamReader()
    with os.fdopen(read_end, "rb", buffering=0) as pipe:
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), pipe
        )
        try:
            yield reader
        finally:
            transport.close()


async def _next(status: asyncio.StreamReader) -> dict[str, int]:
    """The next thing that bwrap tells; empty when it ended, as its exit code and log then say."""
    line = await status.readline()
    return dict(json.loads(line)) if line else {}
