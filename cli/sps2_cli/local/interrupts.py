"""Signals that end `sps2 up`: the first asks for a drain, a second Ctrl-C ends everything at once."""

import signal
import time
from types import FrameType, TracebackType
from typing import Any, Self

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SLICE_S = 0.05


class Interrupts:
    """Counts signals while it is entered; the main thread looks at it between short waits.

    The handler only counts: whatever takes a lock could meet itself in the interrupted code.
    """

    def __init__(self) -> None:
        self._received: list[int] = []
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for one in STOP_SIGNALS:
            self._previous[one] = signal.signal(one, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        for one, handler in self._previous.items():
            signal.signal(one, handler)

    def _handle(self, signum: int, _: FrameType | None) -> None:
        self._received.append(signum)

    @property
    def stop(self) -> bool:
        """Whether to drain and end."""
        return bool(self._received)

    @property
    def now(self) -> bool:
        """Whether to end at once."""
        return self._received.count(signal.SIGINT) > 1

    def sleep(self, seconds: float) -> None:
        """Waits, or returns early at the first signal."""
        until = time.monotonic() + seconds
        while not self.stop and (left := until - time.monotonic()) > 0:
            time.sleep(min(SLICE_S, left))
