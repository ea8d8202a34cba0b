"""Whether a failed attempt is followed by another one. Pure: no clock, no gRPC.

The router is the one owner of retries. A failure of a worker is tried again, on other groups where there are some:
before the commit point the client has seen nothing, after it the next attempt goes on where the stream has come to.
"No room now" is no failure: it is waited out, by a request that was given room once for as long as it may live, since
preemption is how a group makes room. Nor is it a failure that a group drains: the attempt is made on another one.
"""

import copy
from dataclasses import dataclass

from sps2_router.handshake import Phase
from sps2_router.retry_budget import RetryBudget
from sps2_router.types import GroupPair
from sps2_router.worker_errors import WORKER_LOST
from sps2_service.errors import GROUP_DRAINING, PREEMPTED, Aborted, ServiceError, Unavailable

MIN_WAIT_S = 0.02
MAX_WAIT_S = 1.0


@dataclass(frozen=True)
class RetryLimits:
    """How long the router keeps trying."""

    max_attempts: int = 3
    """Attempts that may fail before the request does; waiting for room is none."""
    admission_wait_s: float = 60.0
    """Seconds that a request is told "no room now" by decode groups, unless it was given room before."""
    queue_wait_s: float = 300.0
    """Seconds that a request waits for a place on a prefill group, unless it had one before."""
    retry_after_s: float = 1.0
    """What the client is told to wait when the router gives up."""


class Retries:
    """The history of one request's attempts."""

    def __init__(self, limits: RetryLimits, budget: RetryBudget) -> None:
        self._limits = limits
        self._budget = budget
        self._failed_groups: frozenset[str] = frozenset()
        self._full_groups: frozenset[str] = frozenset()
        self._draining_groups: frozenset[str] = frozenset()
        self._waiting_since: float | None = None
        self._cause: ServiceError | None = None
        """The first failure that names what died; later ones may be its echoes."""
        self._has_begun = False
        """Whether the client may have seen tokens, of this attempt or an earlier one."""
        self.num_failures = 0
        self.failed_at: float | None = None
        """When the last attempt that had room failed, by the clock of `after`."""
        self.asked_at_us: int | None = None
        """When an attempt first had a place and asked for room; None before that."""
        self.had_room = False
        """Whether an attempt was given room."""

    def fork(self) -> "Retries":
        """That of one of the request's choices, which goes on by itself; they share the budget."""
        return copy.copy(self)

    @property
    def avoid(self) -> frozenset[str]:
        """Groups to pick only when there is no other."""
        return self._failed_groups | self._full_groups | self._draining_groups

    def after(self, error: ServiceError, phase: Phase, pair: GroupPair, now: float) -> float:
        """Seconds to wait before the next attempt.

        Args:
            error: What ended the attempt.
            phase: Where it was.
            pair: Who served it.
            now: Time in seconds, of any monotonic clock.

        Raises:
            ServiceError: there will be no other attempt; this goes to the client.
        """
        if phase is not Phase.RESERVING:
            self.failed_at = now
        if error.reason == GROUP_DRAINING:
            return self._move_on(_to_blame(error, pair))
        if isinstance(error, Unavailable) and self._is_no_failure(error, phase):
            return self._wait_for_room(error, pair, now)
        if not isinstance(error, Unavailable | Aborted):
            raise error
        self.num_failures += 1
        if self._cause is None and "component" in error.metadata:
            self._cause = error
        self._failed_groups |= _to_blame(error, pair)
        if self.num_failures >= self._limits.max_attempts:
            raise self._given_up(error, f"{error.message} (attempt {self.num_failures}, the last)")
        # The first retry is quick, as there may be another group; the next gives one time to re-form.
        pause = MAX_WAIT_S if self.num_failures > 1 else MIN_WAIT_S
        return max(pause, self._pay(error, phase, now))

    def _pay(self, error: ServiceError, phase: Phase, now: float) -> float:
        self._has_begun |= phase is Phase.COMMITTED
        if not self._has_begun and not self._budget.can_take(now):
            raise self._given_up(error, f"{error.message} (too many attempts fail to try each again)")
        return self._budget.take(now)

    def _is_no_failure(self, error: Unavailable, phase: Phase) -> bool:
        if error.reason == PREEMPTED:
            return True
        # A leader that has died stays in the directory for the rest of its lease; what is live outwaits that.
        is_away = self.had_room and error.reason == WORKER_LOST
        return phase is Phase.RESERVING and (error.retry_after is not None or is_away)

    def _move_on(self, groups: frozenset[str]) -> float:
        # A group that was known to drain is tried again only where there is no other: that takes a while.
        is_news = not groups <= self._draining_groups
        self._draining_groups |= groups
        return MIN_WAIT_S if is_news else MAX_WAIT_S

    def _wait_for_room(self, error: Unavailable, pair: GroupPair, now: float) -> float:
        self._full_groups = frozenset({pair.decode.name})
        self._waiting_since = now if self._waiting_since is None else self._waiting_since
        waited = now - self._waiting_since
        retry_after = self._limits.retry_after_s if error.retry_after is None else error.retry_after
        delay = min(max(retry_after, MIN_WAIT_S), MAX_WAIT_S)
        if not self.had_room and waited + delay > self._limits.admission_wait_s:
            raise self._given_up(error, f"{error.message} (waited {waited:.1f} s for room)")
        return delay

    def no_group(self, error: Unavailable) -> Unavailable:
        """What goes to the client when no groups are left to try."""
        return self._given_up(error, error.message) if self.num_failures else error

    def _given_up(self, error: ServiceError, message: str) -> Unavailable:
        cause = self._cause or error
        if cause is not error:
            message = f"{message}; it began with: {cause.message}"
        return Unavailable(
            error.reason,
            message,
            retry_after=error.retry_after or self._limits.retry_after_s,
            metadata={**cause.metadata, **error.metadata},
        )


def _to_blame(error: ServiceError, pair: GroupPair) -> frozenset[str]:
    """The group of the component that the error names, or both."""
    group = error.metadata.get("component", "").partition("/")[0]
    both = frozenset({pair.prefill.name, pair.decode.name})
    return both & {group} or both
