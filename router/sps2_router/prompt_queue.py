"""The prompts whose prefill has not begun: how many may be here, and who had better come again later.

Bounded in tokens, for all and for each tenant, and in time: whoever would wait for too long is told so at once, with a
time to come again: about as long as it would have waited here, by how fast the queue empties. Knows nothing of groups
and gRPC. Used on one event loop only.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sps2_router.come_again import UNKNOWN_RETRY_S, spread
from sps2_router.drain_rate import DrainRate
from sps2_router.line import Line
from sps2_router.policies.base import Ask
from sps2_router.tenants import Tenants
from sps2_router.token_bucket import TokenBucket
from sps2_service.errors import QuotaViolation, ResourceExhausted, Unavailable

LET_IN = 0.5
"""Whoever is expected to wait for more than this part of the time that it may is not let in: the rest is for what the
estimate is off by and, of a deadline, for the answer. So who is let in is hardly ever sent away later."""


@dataclass(frozen=True)
class QueueLimits:
    """What may wait at one router."""

    max_tokens: int = 1_000_000
    """Prompt tokens of all requests whose prefill has not begun; one request alone always fits. As many again are for
    tenants within their shares of it by weight, so that a queue which others have filled keeps nobody out."""
    max_wait_s: float = 300.0
    """Longest wait in seconds; whoever is expected to wait for more than half of it is not let in."""


class Queued:
    """One prompt's part of the queue."""

    def __init__(self, queue: "PromptQueue", ask: Ask) -> None:
        self.ask = ask
        self.is_placed = False
        """Whether it is with a prefill group, whatever it waits for there."""
        self._queue = queue

    @contextmanager
    def placed(self) -> Iterator[None]:
        """It is with a prefill group while the block runs."""
        self.is_placed = True
        self._queue.note()
        try:
            yield
        finally:
            self.is_placed = False
            self._queue.note()

    def leave(self) -> None:
        """Its prefill has begun; may be said again."""
        self._queue.begun(self)


class PromptQueue:
    """All of them."""

    def __init__(
        self, limits: QueueLimits, tenants: Tenants, line: Line, draw: Callable[[], float] = random.random
    ) -> None:
        """`line` is where they wait for a prefill group; `draw` gives numbers in [0, 1)."""
        self._limits = limits
        self._tenants = tenants
        self._line = line
        self._draw = draw
        self._queued: set[Queued] = set()
        self._tokens_of: Counter[str] = Counter()
        """By tenant."""
        self._buckets: dict[str, TokenBucket] = {}
        self._drains = {is_short: DrainRate() for is_short in (False, True)}
        """Of short prompts and of others, which wait for places of their own."""
        self._now = asyncio.get_running_loop().time

    @property
    def num_waiting(self) -> int:
        """Prompts that wait for their prefill."""
        return len(self._queued)

    @property
    def num_tokens(self) -> int:
        """Prompt tokens that wait for their prefill."""
        return self._tokens_of.total()

    def check(self, ask: Ask, turn: int, time_left: float) -> None:
        """Whether one could queue now.

        Args:
            ask: What comes; its tokens may be too few while they are not known.
            turn: See `Line.place`.
            time_left: Seconds that the call has left.

        Raises:
            Unavailable: the queue is full, or the wait would be too long.
            ResourceExhausted: a quota of its tenant.
        """
        self._check_quotas(ask)
        self._check_room(ask)
        self._check_wait(ask, turn, time_left)

    @contextmanager
    def hold(
        self, ask: Ask, turn: int, time_left: float, num_drawn: Callable[[], int] = lambda: 0
    ) -> Iterator[Queued]:
        """Serves one while the block runs: in the queue until it leaves it. Raises like `check`.

        `num_drawn` says at the end how many of its new tokens there are: a quota counts no others.
        """
        self.check(ask, turn, time_left)
        queued = Queued(self, ask)
        self._charge(ask.tenant, ask.num_tokens + ask.max_new_tokens)
        self._queued.add(queued)
        self._tokens_of[ask.tenant] += ask.num_tokens
        self.note()
        try:
            yield queued
        finally:
            never_began = queued in self._queued
            self._remove(queued)
            self._charge(
                ask.tenant, num_drawn() - ask.max_new_tokens - (ask.num_tokens if never_began else 0)
            )

    def begun(self, queued: Queued) -> None:
        """Prefill has begun with one, perhaps not for the first time."""
        if queued in self._queued:
            self._drains[queued.ask.is_short].left(queued.ask.num_tokens, self._now())
            self._remove(queued)

    def note(self) -> None:
        """Somebody's place has changed."""
        waiting = {one.ask.is_short for one in self._queued if not one.is_placed}
        for is_short, drain in self._drains.items():
            drain.waiting(is_short in waiting, self._now())

    def _remove(self, queued: Queued) -> None:
        if queued in self._queued:
            self._queued.remove(queued)
            self._tokens_of[queued.ask.tenant] -= queued.ask.num_tokens
            self.note()

    def _charge(self, tenant: str, num_tokens: int) -> None:
        """Negative gives back."""
        if self._tenants.limits(tenant).tokens_per_minute is not None:
            self._bucket(tenant).take(num_tokens)

    def _bucket(self, tenant: str) -> TokenBucket:
        return self._buckets.setdefault(tenant, TokenBucket())

    def _check_quotas(self, ask: Ask) -> None:
        limits = self._tenants.limits(ask.tenant)
        most, waiting = limits.max_queued_tokens, self._tokens_of[ask.tenant]
        if most is not None and not self._fits(waiting, ask, most):
            raise over_quota(
                ask.tenant,
                "TENANT_QUEUE_FULL",
                f"{most} prompt tokens of this tenant may wait at once",
                self._drained_after(waiting),
            )
        if (rate := limits.tokens_per_minute) is not None:
            num_tokens = ask.num_tokens + ask.max_new_tokens
            wait_s = self._bucket(ask.tenant).wait_s(num_tokens, rate, self._now())
            if wait_s > 0:
                raise over_quota(
                    ask.tenant,
                    "TOKENS_PER_MINUTE",
                    f"{rate} tokens a minute, of prompts and answers, are this tenant's",
                    spread(wait_s, self._draw()),
                )

    def _check_room(self, ask: Ask) -> None:
        limit, own = self._limits.max_tokens, self._tokens_of[ask.tenant] + ask.num_tokens
        is_in_share = own <= limit * self._share(ask.tenant)
        if not self._fits(self.num_tokens, ask, 2 * limit if is_in_share else limit):
            raise Unavailable(
                "QUEUE_FULL",
                f"{self.num_tokens} prompt tokens are queued and {ask.num_tokens} more would pass the "
                f"limit of {limit}; try again",
                retry_after=self._drained_after(self.num_tokens),
                metadata={"limit": str(limit)},
            )

    def _check_wait(self, ask: Ask, turn: int, time_left: float) -> None:
        rate = self._drains[ask.is_short].rate(self._now())
        if rate is None:
            return
        # With a prefill group, or before it in the line; those of the other kind hold it up in nothing.
        alike = sum(one.ask.num_tokens for one in self._queued if one.ask.is_short is ask.is_short)
        num_before = alike - self._line.num_tokens[ask.is_short] + self._line.tokens_before(ask, turn)
        wait_s, limit_s = num_before / rate, min(self._limits.max_wait_s, time_left)
        if wait_s > LET_IN * limit_s:
            raise Unavailable(
                "QUEUE_WAIT",
                f"about {wait_s:.1f} s of prefill are queued before it, and it has {limit_s:.1f} s; try again",
                retry_after=spread(wait_s, self._draw()),
            )

    def _share(self, tenant: str) -> float:
        """A tenant's part of the queue, among all that have a part of it."""
        there = {one for one, num_tokens in self._tokens_of.items() if num_tokens} | {tenant}
        return self._tenants.weight(tenant) / sum(map(self._tenants.weight, there))

    def _fits(self, num_waiting: int, ask: Ask, limit: int) -> bool:
        """One request alone always does."""
        return not num_waiting or num_waiting + ask.num_tokens <= limit

    def _drained_after(self, num_tokens: int) -> float:
        """Seconds to come again after: when those tokens will have left the queue."""
        rate = sum(drain.rate(self._now()) or 0.0 for drain in self._drains.values())
        return spread(num_tokens / rate if rate else UNKNOWN_RETRY_S, self._draw())


def over_quota(tenant: str, reason: str, description: str, retry_after: float) -> ResourceExhausted:
    """A tenant has come to a limit of its own."""
    return ResourceExhausted(
        reason,
        f"{description}; try again later",
        quota=[QuotaViolation(f"tenant:{tenant}", description)],
        retry_after=retry_after,
    )
