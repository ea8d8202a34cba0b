"""A line in which waiters are called in the order of a FairQueue. Knows nothing of what is waited for.

There are two kinds of places to be had, for short and for other requests: who waits for one kind holds nobody up who
waits for the other. On one event loop only.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

from sps2_router.fair_queue import FairQueue, Waiter
from sps2_router.policies.base import Ask


class Place:
    """One waiter's."""

    def __init__(self, line: "Line", waiter: Waiter) -> None:
        self.waiter = waiter
        self.called = asyncio.Event()
        """Set when it has become the first of its kind."""
        self.served = False
        """Whether it has got what it waits for; set by whoever gives it, before it leaves."""
        self._line = line

    @property
    def position(self) -> int:
        """Waiters of its kind before it; 0 also when it waits no more."""
        return self._line.position(self)

    async def first(self) -> None:
        """Returns when nobody of its kind is before it, perhaps at once; another may come before it later."""
        while self._line.first_of(is_short=self.waiter.is_short) is not self:
            self.called.clear()
            await self.called.wait()


class Line:
    """Its waiters."""

    def __init__(self, weight: Callable[[str], float] = lambda _: 1.0) -> None:
        """`weight`: a tenant's share."""
        self._queue = FairQueue(weight)
        self._places: dict[Waiter, Place] = {}
        self._number = count()
        self.num_tokens: Counter[bool] = Counter()
        """Tokens that prefill is to compute for those who wait and never were served, by whether they are short."""

    @property
    def is_empty(self) -> bool:
        """Whether nobody waits."""
        return not self._places

    def first_of(self, *, is_short: bool) -> Place | None:
        """Whose turn it is among those of a kind."""
        first = self._queue.first_of(is_short=is_short)
        return None if first is None else self._places[first]

    def position(self, place: Place) -> int:
        """Waiters of its kind before one; 0 also when it waits no more."""
        return sum(1 for _ in self._before(place.waiter)) if place.waiter in self._places else 0

    def tokens_before(self, ask: Ask, turn: int) -> int:
        """Of `num_tokens` of its kind, what would be before one that came now if nobody came after it."""
        before = self._before(self._waiter(ask, turn, paid=False))
        return sum(one.num_tokens for one in before if not one.paid)

    def forget_shares(self) -> None:
        """Nobody had to wait for a moment; see `FairQueue.forget`."""
        self._queue.forget()

    @contextmanager
    def place(self, ask: Ask, turn: int, *, paid: bool = False) -> Iterator[Place]:
        """Stands in line while the block runs.

        Args:
            ask: What waits.
            turn: Of those of one tenant the lower goes first; of equal ones the one that came first.
            paid: It was served before and has come back.
        """
        waiter = self._waiter(ask, turn, paid=paid)
        place = self._places[waiter] = Place(self, waiter)
        self._queue.add(waiter)
        num_tokens = 0 if paid else ask.num_tokens
        self.num_tokens[ask.is_short] += num_tokens
        try:
            yield place
        finally:
            (self._queue.serve if place.served else self._queue.remove)(waiter)
            del self._places[waiter]
            self.num_tokens[ask.is_short] -= num_tokens
            for is_short in (False, True):
                if (first := self.first_of(is_short=is_short)) is not None:
                    first.called.set()

    def _before(self, waiter: Waiter) -> Iterator[Waiter]:
        return (one for one in self._queue.before(waiter) if one.is_short is waiter.is_short)

    def _waiter(self, ask: Ask, turn: int, *, paid: bool) -> Waiter:
        cost = ask.num_tokens + ask.max_new_tokens
        return Waiter(ask.tenant, (turn, next(self._number)), cost, ask.num_tokens, paid, ask.is_short)
