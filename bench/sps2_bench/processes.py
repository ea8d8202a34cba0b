"""Measured programs as child processes of their own: pinned to cores, one JSON line in, one out.

A child is a fresh interpreter, not a fork: it has the threads and the memory that the program alone has.
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self, TypeAlias

Message: TypeAlias = dict[str, Any]

END_TIMEOUT_S = 10.0


class WorkerError(RuntimeError):
    """A child ended or fell silent; it has said why on stderr."""


class Worker:
    """One child that runs `python -m MODULE SETTINGS` and answers each line with one."""

    def __init__(self, module: str, settings: Message, cpus: Sequence[int]) -> None:
        """`cpus` are the cores it may run on, one thread on each."""
        self.name = module
        self._received = b""
        environment = {**os.environ, "OMP_NUM_THREADS": str(len(cpus)), "TOKENIZERS_PARALLELISM": "false"}
        arguments = json.dumps({**settings, "cpus": list(cpus)})
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, message: Message) -> None:
        """Sends a message; the answer is fetched with `answer`.

        Raises:
            WorkerError: the child has ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise WorkerError(f"{self.name} has ended") from error

    def answer(self, timeout_s: float) -> Message:
        """The next answer.

        Raises:
            WorkerError: the child ended, or gave none within `timeout_s` seconds.
        """
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._received:
            if not select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise WorkerError(f"{self.name} gave no answer within {timeout_s:g} s")
            chunk = os.read(self._process.stdout.fileno(), 65536)
            if not chunk:
                raise WorkerError(f"{self.name} ended with exit code {self._process.wait(END_TIMEOUT_S)}")
            self._received += chunk
        line, _, self._received = self._received.partition(b"\n")
        message: Message = json.loads(line)
        return message

    def close(self) -> None:
        """Ends the child, at the latest by force."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.terminate()
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


def serve(make: Callable[[Message], Callable[[Message], Message]]) -> None:
    """The child's side: makes a handler of the settings and answers each line of stdin until it ends.

    stdout belongs to the answers: what libraries print there goes to stderr.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    settings: Message = json.loads(sys.argv[1])
    os.sched_setaffinity(0, settings["cpus"])
    handle = make(settings)
    for line in sys.stdin:
        answers.write(json.dumps(handle(json.loads(line))) + "\n")
        answers.flush()


def available_cpus() -> list[int]:
    """Cores that this process may use."""
    return sorted(os.sched_getaffinity(0))
