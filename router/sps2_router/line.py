"""A line in which waiters are called in the order of a FairQueue. Knows nothing of what is waited for.

On one event loop only.
"""

import asyncio
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
        """Set when it has become the first."""
        self.served = False
        """Whether it has got what it waits for; set by whoever gives it, before it leaves."""
        self._line = line

    @property
    def position(self) -> int:
        """Waiters before it; 0 also when it waits no more."""
        return self._line.position(self)

    async def first(self) -> None:
        """Returns when nobody is before it, perhaps at once; another may come before it later."""
        while self._line.first is not self:
            self.called.clear()
            await self.called.wait()


class Line:
    """Its waiters."""

    def __init__(self, weight: Callable[[str], float] = lambda _: 1.0) -> None:
        """`weight`: a tenant's share."""
        self._queue = FairQueue(weight)
        self._places: dict[Waiter, Place] = {}
        self._number = count()
        self.num_tokens = 0
        """Tokens that prefill is to compute for those who wait and never were served."""

    @property
    def first(self) -> Place | None:
        """Whose turn it is."""
        first = self._queue.first
        return None if first is None else self._places[first]

    def position(self, place: Place) -> int:
        """Waiters before one; 0 also when it waits no more."""
        return sum(1 for _ in self._queue.before(place.waiter)) if place.waiter in self._places else 0

    def tokens_before(self, ask: Ask, turn: int) -> int:
        """Of `num_tokens`, what would be before one that came now if nobody came after it."""
        before = self._queue.before(self._waiter(ask, turn, paid=False))
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
        self.num_tokens += num_tokens
        try:
            yield place
        finally:
            (self._queue.serve if place.served else self._queue.remove)(waiter)
            del self._places[waiter]
            self.num_tokens -= num_tokens
            if (first := self.first) is not None:
                first.called.set()

    def _waiter(self, ask: Ask, turn: int, *, paid: bool) -> Waiter:
        cost = ask.num_tokens + ask.max_new_tokens
        return Waiter(ask.tenant, (turn, next(self._number)), cost, ask.num_tokens, paid)
