"""Child processes for tests: started, watched line by line, and ended whatever happens.

A `ManagedProcess` leads its own process group, so that ending it ends what it started too; it also gets a
parent-death signal, so that a killed pytest leaves nothing behind. It knows nothing about SPS2.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

# Asks for SIGKILL on the parent's death (prctl 1 = PR_SET_PDEATHSIG), then becomes the command. A preexec_fn
# could do the first part, but makes subprocess fork instead of vfork, and threads (gRPC's) bear that badly.
LAUNCHER = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the test run has ended already")
os.execvp(sys.argv[2], sys.argv[2:])
"""


class ProcessError(AssertionError):
    """A child did not do what a test waited for; the message holds the end of its output."""


class ManagedProcess:
    """One child with its stdout and stderr (merged, in order) captured as lines.

    Use it as a context manager, or take the `processes` fixture, which makes and ends them:

        with ManagedProcess([sys.executable, "-P", "-m", "sps2_router"]) as router:
            port = int(router.wait_for_line(r"listening on .*:(\\d+)").group(1))
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        name: str = "",
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        pass_fds: Sequence[int] = (),
        stop_timeout: float = 10.0,
    ) -> None:
        """`env` is added to this process's environment; SIGTERM gets `stop_timeout` s before SIGKILL."""
        self.command = [str(part) for part in command]
        self.name = name or Path(self.command[0]).name
        self.env = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
        self.cwd = cwd
        self.pass_fds = tuple(pass_fds)
        self.stop_timeout = stop_timeout
        self._lines: list[str] = []
        self._eof = False
        self._changed = threading.Condition()
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    def start(self) -> Self:
        """Starts the child; returns at once."""
        if self._process is not None:
            raise RuntimeError(f"{self.name} was already started")
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", LAUNCHER, str(os.getpid()), *self.command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=self.env,
            cwd=self.cwd,
            pass_fds=self.pass_fds,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name=f"reader-{self.name}", daemon=True)
        self._reader.start()
        return self

    def _read(self) -> None:
        stdout = self.popen.stdout
        assert stdout is not None
        for line in stdout:
            with self._changed:
                self._lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._eof = True
            self._changed.notify_all()

    @property
    def popen(self) -> subprocess.Popen[str]:
        """The child itself."""
        if self._process is None:
            raise RuntimeError(f"{self.name} was not started")
        return self._process

    @property
    def pid(self) -> int:
        """The child's process id, also the id of its process group."""
        return self.popen.pid

    @property
    def lines(self) -> list[str]:
        """What the child has printed so far."""
        with self._changed:
            return list(self._lines)

    @property
    def output(self) -> str:
        """The same as one text."""
        return "\n".join(self.lines)

    @property
    def running(self) -> bool:
        """Whether the child has been started and has not exited."""
        return self._process is not None and self._process.poll() is None

    def wait_for_line(self, pattern: str, timeout: float = 20.0, after: int = 0) -> re.Match[str]:
        """The first match of the regular expression in lines[after:], also in those that are still to come.

        Raises:
            ProcessError: no such line within `timeout` seconds, or the output ended without it.
        """
        regex = re.compile(pattern)
        deadline = time.monotonic() + timeout
        seen = after
        with self._changed:
            while True:
                for line in self._lines[seen:]:
                    if match := regex.search(line):
                        return match
                seen = max(after, len(self._lines))
                left = deadline - time.monotonic()
                if self._eof or left <= 0:
                    reason = "its output ended" if self._eof else f"nothing in {timeout:g} s"
                    break
                self._changed.wait(left)
        raise ProcessError(f"{self.name}: no line matches {pattern!r}: {reason}\n{self.tail()}")

    def wait_until(
        self, predicate: Callable[[], bool], timeout: float = 20.0, interval: float = 0.05
    ) -> None:
        """Polls `predicate` until it is true; fails early when the child exits before that.

        Raises:
            ProcessError: still false after `timeout` seconds, or the child is gone.
        """
        deadline = time.monotonic() + timeout
        while not predicate():
            if not self.running:
                raise ProcessError(f"{self.name} exited with {self.popen.returncode}\n{self.tail()}")
            if time.monotonic() >= deadline:
                raise ProcessError(f"{self.name}: condition still false after {timeout:g} s\n{self.tail()}")
            with self._changed:
                self._changed.wait(interval)

    def wait(self, timeout: float = 20.0) -> int:
        """The exit code; raises ProcessError when the child still runs after `timeout` seconds."""
        try:
            code = self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ProcessError(f"{self.name} still runs after {timeout:g} s\n{self.tail()}") from None
        self._join_reader()
        return code

    def send(self, signum: int) -> None:
        """Sends a signal to the child alone; nothing happens when it has exited."""
        if self.running:
            self.popen.send_signal(signum)

    def terminate(self) -> int:
        """SIGTERM, then SIGKILL after `stop_timeout`; the exit code. What the child started ends with it."""
        self.send(signal.SIGCONT)
        self.send(signal.SIGTERM)
        try:
            self.popen.wait(self.stop_timeout)
        except subprocess.TimeoutExpired:
            # What it waited for it has said: the end of its output belongs to the message.
            sys.stderr.write(
                f"{self.name} did not end within {self.stop_timeout:g} s of SIGTERM and was killed\n{self.tail()}\n"
            )
        return self.kill()

    def kill(self) -> int:
        """SIGKILL to the whole process group, at once; the exit code."""
        # The group outlives its leader as long as one member lives, so it is signalled even after an exit;
        # its id cannot have been reused for another group while that is so.
        with suppress(ProcessLookupError):  # nothing of it is left, which is what is wanted
            os.killpg(self.pid, signal.SIGKILL)
        code = self.popen.wait(10)
        self._join_reader()
        return code

    def _join_reader(self) -> None:
        # A grandchild in another group may keep the pipe open, and the (daemon) reader alive: give up then.
        if self._reader is not None:
            self._reader.join(2)
            if not self._reader.is_alive() and self.popen.stdout is not None:
                self.popen.stdout.close()

    def tail(self, count: int = 60) -> str:
        """The end of the output, with a heading, for a failure message."""
        lines = self.lines[-count:]
        return "\n".join(
            [f"--- last {len(lines)} lines of {self.name} ({' '.join(self.command)})", *lines, "---"]
        )

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        if self._process is None:
            return
        self.terminate()
        if kind is not None:
            sys.stderr.write(self.tail() + "\n")
