"""How fast a queue empties, from what has left it while somebody waited. Pure: time is an argument, in seconds.

What leaves is counted in tokens of prompts, or in requests.
"""

from collections import deque

WINDOW = 32
"""Departures that are looked back on."""
MIN_DEPARTURES = 4
FORGET_S = 60.0
"""After so long without anybody waiting it is measured anew: groups may have come and gone."""


class DrainRate:
    """Tokens, or requests, per second.

    Time in which nobody waits is left out: what leaves then says how much came, not how much could go. It looks back
    on a number of departures instead of a stretch of time, since one long prompt may take longer than any such.
    """

    def __init__(self) -> None:
        self._departures: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        """Seconds of waiting until each, and how much it was."""
        self._waited = 0.0
        self._since: float | None = None
        """When it was last known that somebody waits; None while nobody does."""
        self._ended = 0.0

    def waiting(self, is_waiting: bool, now: float) -> None:
        """Whether somebody waits from now on."""
        if self._since is not None:
            self._waited += now - self._since
            self._ended = now
        elif is_waiting and now - self._ended > FORGET_S:
            self._departures.clear()
        self._since = now if is_waiting else None

    def left(self, amount: int, now: float) -> None:
        """So much has left the queue: the work on it begins, or is over."""
        if self._since is not None:
            self._departures.append((self._elapsed(now), amount))

    def rate(self, now: float) -> float | None:
        """What leaves each second; None before it is known."""
        if len(self._departures) < MIN_DEPARTURES:
            return None
        (first, _), (last, newest) = self._departures[0], self._departures[-1]
        total = sum(amount for _, amount in self._departures)
        if last <= first:
            return None
        # The newest is being worked on: it counts only when that takes longer than the others let expect.
        return min((total - newest) / (last - first), total / max(self._elapsed(now) - first, last - first))

    def _elapsed(self, now: float) -> float:
        return self._waited + (0.0 if self._since is None else now - self._since)
