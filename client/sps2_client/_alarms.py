"""Limits for waits that gRPC's blocking API cannot limit: one daemon thread that cancels what is overdue.

A blocking stream has a deadline for the whole call only, none for its next message; so a wait is armed before
it begins and disarmed after it.
"""

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager


class Alarm:
    """One stream's alarm, used by one thread at a time."""

    def __init__(self, clock: "AlarmClock") -> None:
        self._clock = clock
        self.fired = False
        """Whether it ever went off; it stays so."""
        self.due: float | None = None
        self.on_fire: Callable[[], object] | None = None
        self.queued_for: float | None = None

    @contextmanager
    def armed(self, seconds: float | None, on_fire: Callable[[], object]) -> Generator[None]:
        """Calls `on_fire` (once, on the clock's thread) when the block takes over `seconds`; None: never."""
        if seconds is None:
            yield
            return
        self._clock.arm(self, time.monotonic() + seconds, on_fire)
        try:
            yield
        finally:
            self._clock.disarm(self)


class AlarmClock:
    """Alarms of one client. The thread starts with the first alarm and ends with `close`."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: list[tuple[float, int, Alarm]] = []
        self._order = itertools.count()
        self._thread: threading.Thread | None = None
        self._closed = False

    def arm(self, alarm: Alarm, due: float, on_fire: Callable[[], object]) -> None:
        """Sets an alarm; `due` is on time.monotonic()."""
        with self._changed:
            alarm.due, alarm.on_fire = due, on_fire
            # An entry that comes up too early is queued again then, so each alarm has about one entry however
            # often it is set.
            if alarm.queued_for is None or due < alarm.queued_for:
                self._push(alarm, due)
                self._changed.notify()
            if self._thread is None and not self._closed:
                thread = threading.Thread(target=self._run, name="sps2-client-alarms", daemon=True)
                thread.start()
                self._thread = (
                    thread  # only now: Ctrl-C may strike in between, and `close` joins what it finds
                )

    def disarm(self, alarm: Alarm) -> None:
        """Takes an alarm back."""
        with self._changed:
            alarm.due = alarm.on_fire = None

    def close(self) -> None:
        """Ends the thread; alarms that are set never go off."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(5)

    def _push(self, alarm: Alarm, due: float) -> None:
        alarm.queued_for = due
        heapq.heappush(self._queue, (due, next(self._order), alarm))

    def _run(self) -> None:
        while (on_fire := self._next_overdue()) is not None:
            on_fire()

    def _next_overdue(self) -> Callable[[], object] | None:
        """Waits for the next alarm that goes off; None when the clock is closed."""
        with self._changed:
            while not self._closed:
                wait = self._queue[0][0] - time.monotonic() if self._queue else None
                if wait is None or wait > 0:
                    self._changed.wait(wait)
                    continue
                if (on_fire := self._pop()) is not None:
                    return on_fire
        return None

    def _pop(self) -> Callable[[], object] | None:
        """Takes the earliest entry; its callback when the alarm is really due."""
        queued_for, _, alarm = heapq.heappop(self._queue)
        if alarm.queued_for != queued_for:
            return None  # an earlier entry of the same alarm took its place
        alarm.queued_for = None
        if alarm.due is None:
            return None
        if alarm.due > time.monotonic():
            self._push(alarm, alarm.due)
            return None
        on_fire, alarm.fired = alarm.on_fire, True
        alarm.due = alarm.on_fire = None
        return on_fire
