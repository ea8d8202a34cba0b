"""One child process: started so that it cannot outlive us, heard, and ended."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from sps2_cli import child as child_program
from sps2_cli.local.logs import MAX_LINE_CHARS, LineLog
from sps2_cli.local.plan import ProcessSpec

WRAPPER = (sys.executable, "-I", "-S", str(Path(child_program.__file__).resolve()))
READER_PATIENCE_S = 2.0


class ChildProcess:
    """A running process of a deployment.

    Made on the main thread only: the kernel ties a child to the *thread* that started it. The child leads its
    own process group, so Ctrl-C on the terminal does not reach it and its own children end with it.
    """

    def __init__(self, spec: ProcessSpec, log: LineLog, *, announce: bool) -> None:
        """Starts it.

        Args:
            spec: What to run.
            log: Takes its stdout and stderr, line by line.
            announce: Ask it to tell where it listens; see `poll_address`.

        Raises:
            OSError: it cannot be started.
        """
        self.spec = spec
        self.log = log
        self.address: str | None = None if announce else spec.listen
        self.started_at = time.monotonic()
        self._announced = b""
        self._announce_fd: int | None = None
        self._popen = self._start(announce)
        self._reader = threading.Thread(target=self._read, name=f"log-{spec.name}", daemon=True)
        self._reader.start()

    def _start(self, announce: bool) -> subprocess.Popen[bytes]:
        pinned = (child_program.CPUS_FLAG, str(self.spec.cpus)) if self.spec.cpus else ()
        command = [*WRAPPER, str(os.getpid()), *pinned, *self.spec.command]
        write_fd: int | None = None
        if self.spec.listen is not None:
            command += ["--listen", self.spec.listen]
        if self.spec.metrics:
            command += ["--metrics-port", self.spec.metrics]
        if announce:
            self._announce_fd, write_fd = os.pipe()
            os.set_blocking(self._announce_fd, False)
            command += ["--announce-fd", str(write_fd)]
        try:
            popen = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "SPS2_LOG_FORMAT": "json", **self.spec.env},
                pass_fds=() if write_fd is None else (write_fd,),
                process_group=0,
            )
        finally:
            if write_fd is not None:
                os.close(write_fd)  # the child has its own; ours would hide the end of the pipe
        assert popen.stdin is not None
        # A child that has died already is seen by the caller soon enough.
        with (
            contextlib.suppress(BrokenPipeError),
            popen.stdin as stdin,
        ):
            stdin.write(self.spec.stdin.encode())
        return popen

    def _read(self) -> None:
        stdout = self._popen.stdout
        assert stdout is not None
        with stdout:
            while line := stdout.readline(MAX_LINE_CHARS):
                self.log.add(line.decode(errors="replace"))

    @property
    def name(self) -> str:
        """Its name."""
        return self.spec.name

    @property
    def pid(self) -> int:
        """Its process id, also that of its group."""
        return self._popen.pid

    @property
    def exit_code(self) -> int | None:
        """Exit code, -N for signal N; None while it runs.

        The process is looked at, not reaped: until `kill` its id, which is its group's, cannot be another's.
        """
        if self._popen.returncode is not None:
            return self._popen.returncode
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def poll_address(self) -> str | None:
        """Where it listens, once it has said so; never waits."""
        if self.address is None and self._announce_fd is not None:
            with contextlib.suppress(BlockingIOError):  # nothing said yet
                self._announced += os.read(self._announce_fd, 256)
            if self._announced.endswith(b"\n"):
                self.address = self._announced.decode().strip()
                self._close_announce_fd()
        return self.address

    def send(self, signum: signal.Signals) -> None:
        """Sends a signal to the process itself, if it still runs."""
        if self._popen.returncode is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        """Ends what is left of its process group at once, reaps it, takes its last lines; idempotent."""
        if self._popen.returncode is None:
            os.killpg(self.pid, signal.SIGKILL)
            self._popen.wait(10)
        self._reader.join(READER_PATIENCE_S)
        self._close_announce_fd()

    def _close_announce_fd(self) -> None:
        if self._announce_fd is not None:
            os.close(self._announce_fd)
            self._announce_fd = None


def exit_text(code: int) -> str:
    """How a process ended: "exit code 1", "killed by SIGKILL"."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
