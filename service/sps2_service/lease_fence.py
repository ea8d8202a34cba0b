"""How long a worker may act on its lease without news from the directory. Pure: times come as arguments."""

import math
from dataclasses import dataclass

FENCE_SHARE = 0.6
"""Of the lease's TTL (3 of 5 s): a worker stops this long after *sending* the last heartbeat that was answered well.
The directory counts the TTL from when it got that heartbeat, which is later, so the worker stops first."""


@dataclass
class LeaseFence:
    """A worker whose fence is down refuses new placements and sends no new slabs; running streams go on.

    Times are seconds of one monotonic clock. That of the machine (`time.monotonic`) runs on while a process is
    stopped, so that a worker that wakes up finds itself fenced before it does anything.
    """

    holds_until: float = -math.inf
    """From then on the worker is fenced; -inf without a lease."""

    def renew(self, sent_at: float, ttl_s: float) -> None:
        """A heartbeat that was sent at `sent_at` was answered well: the directory knows of the lease."""
        self.holds_until = max(self.holds_until, sent_at + FENCE_SHARE * ttl_s)

    def keep(self, sent_at: float, ttl_s: float) -> None:
        """It was answered DEGRADED: a lease that held goes on, for none ends meanwhile.

        One that had lapsed stays so: it may have ended before the directory lost sight of its store.
        """
        if self.holds(sent_at):
            self.renew(sent_at, ttl_s)

    def lose(self) -> None:
        """The directory knows of no lease: nothing is held until there is a new one."""
        self.holds_until = -math.inf

    def holds(self, now: float) -> bool:
        """Whether the worker may act now."""
        return now < self.holds_until
