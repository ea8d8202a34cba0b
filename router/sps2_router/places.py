"""A bounded number of places, and when one is free for whoever finds all of them taken. Pure: time is an argument.

Nobody waits for a place: who finds none is sent away with a time to come again. It is counted as if they stood in line,
one place for each at the rate at which places become free while all are taken. So twice as many clients as there are
places come back half as often, and not all of them with the next place.
"""

from collections.abc import Callable

from sps2_router.come_again import MAX_RETRY_S, UNKNOWN_RETRY_S, spread
from sps2_router.drain_rate import DrainRate


class Places:
    """Of one kind. How many there are may change from call to call; times are seconds of one clock."""

    def __init__(self, draw: Callable[[], float]) -> None:
        """`draw` gives numbers in [0, 1)."""
        self._draw = draw
        self._drain = DrainRate()
        self._promised_until = 0.0
        """When the last one that was sent away is expected to find a place."""
        self.num_taken = 0

    def take(self, most: float, now: float) -> None:
        """One of `most` is taken."""
        self.num_taken += 1
        self._drain.waiting(self.num_taken >= most, now)

    def leave(self, most: float, now: float) -> None:
        """One is free again."""
        self._drain.left(1, now)
        self.num_taken -= 1
        self._drain.waiting(self.num_taken >= most, now)

    def come_again_s(self, now: float) -> float:
        """Seconds after which one who is sent away now may find a place."""
        rate = self._drain.rate(now)
        if rate is None:
            return spread(UNKNOWN_RETRY_S, self._draw())
        until = max(self._promised_until, now) + 1 / rate
        self._promised_until = min(until, now + MAX_RETRY_S)
        return spread(self._promised_until - now, self._draw())
