"""How many failed attempts a router tries again, over all its requests. Pure: time is an argument, in seconds.

A fault that hits every attempt would else multiply the load on what is left, just when that is least. So retries are
paid for: each request brings a tenth of one, and some come by the second, so that the death of a group under little
load is always made good. What has begun to stream is never given up for want of it, only slowed: the client has no
other way to go on. What has not begun is told to come back later.
"""

RETRIES_PER_REQUEST = 0.1
RETRIES_PER_S = 10.0
RESERVE = 100.0
"""Retries that may be saved up: the streams of a full group that dies."""


class RetryBudget:
    """Starts with its reserve full."""

    def __init__(self) -> None:
        self._left = RESERVE
        self._at: float | None = None

    def request(self) -> None:
        """A request was admitted."""
        self._left = min(self._left + RETRIES_PER_REQUEST, RESERVE)

    def can_take(self, now: float) -> bool:
        """Whether a retry can be paid for now."""
        self._fill(now)
        return self._left >= 1

    def take(self, now: float) -> float:
        """Uses one retry, on credit where there is none left.

        Returns:
            Seconds until it is paid for, 0 when it is now.
        """
        self._fill(now)
        self._left -= 1
        return max(0.0, -self._left / RETRIES_PER_S)

    def _fill(self, now: float) -> None:
        passed = 0.0 if self._at is None else max(0.0, now - self._at)
        self._left = min(self._left + passed * RETRIES_PER_S, RESERVE)
        self._at = now
