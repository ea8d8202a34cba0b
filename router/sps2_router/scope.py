"""CallScope: a block of code that others can end with a typed error.

Three things end a request from outside: its time is over, somebody cancels it by its id, a retry of the same
call takes its place. All of them go through `end`. The client's own cancellation is not among them: gRPC
cancels the handler's task, and that passes through untouched.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from sps2_service.errors import DeadlineExceeded, ServiceError


class CallScope:
    """Runs the current task's block until it ends, `end` is called, or its time is over.

        with CallScope(total_s=3600, silence_s=300) as scope:
            ...
            scope.touch()

    Per token it costs one clock reading: the silence timer is not moved, it looks back when it fires.
    """

    def __init__(self, *, total_s: float, silence_s: float) -> None:
        """`total_s`: longest life; `silence_s`: longest time between two `touch` calls. Both in seconds."""
        self._loop = asyncio.get_running_loop()
        self._total_s = total_s
        self._silence_s = silence_s
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0
        self._error: ServiceError | None = None
        self._last_event = self._loop.time()
        self._deadline = self._last_event + total_s
        self._timers: list[asyncio.TimerHandle] = []
        self._num_waiting = 0

    @property
    def remaining(self) -> float:
        """Seconds until the total cap, at least 0."""
        return max(0.0, self._deadline - self._loop.time())

    def touch(self) -> None:
        """Something happened: the silence starts anew."""
        self._last_event = self._loop.time()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What is waited for inside has its own bound and is no silence; its end is an event."""
        self._num_waiting += 1
        try:
            yield
        finally:
            self._num_waiting -= 1
            self.touch()

    def end(self, error: ServiceError) -> None:
        """Ends the block: it is cancelled, and `error` comes out of it. The first error counts.

        Must come from outside the block's own task; does nothing before or after the block.
        """
        if self._task is not None and self._error is None:
            self._error = error
            self._task.cancel()

    def __enter__(self) -> Self:
        self._task = asyncio.current_task()
        assert self._task is not None, "a CallScope is entered inside a task"
        self._cancelling = self._task.cancelling()
        self._timers = [
            self._loop.call_at(self._deadline, self._on_deadline),
            self._loop.call_at(self._last_event + self._silence_s, self._on_silence),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        for timer in self._timers:
            timer.cancel()
        # As asyncio.timeout does it: a cancellation that did not come from `end` goes on as one.
        ours = task is not None and self._error is not None and task.uncancel() <= self._cancelling
        if ours and self._error is not None and kind is not None and issubclass(kind, asyncio.CancelledError):
            raise self._error from None

    def _on_deadline(self) -> None:
        self.end(
            DeadlineExceeded(
                "DEADLINE_EXCEEDED",
                f"the request was not done {self._total_s:g} s after it arrived; "
                "ask for fewer tokens or give it a longer deadline",
            )
        )

    def _on_silence(self) -> None:
        now = self._loop.time()
        due = (now if self._num_waiting else self._last_event) + self._silence_s
        if due > now:
            self._timers[1] = self._loop.call_at(due, self._on_silence)
            return
        self.end(
            DeadlineExceeded(
                "SILENT", f"nothing happened on this request for {self._silence_s:g} s; try again"
            )
        )
