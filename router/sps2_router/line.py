"""A line in which turns, not arrival, say who is first. Knows nothing of what is waited for. On one event loop only.

There are two kinds of places to be had, for short and for other requests: who waits for one kind holds nobody up who
waits for the other.
"""

import asyncio
from bisect import insort
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count


class Place:
    """One waiter's."""

    def __init__(self, line: "Line", turn: tuple[int, int], *, is_short: bool) -> None:
        self.turn = turn
        self.is_short = is_short
        self.called = asyncio.Event()
        """Set when it has become the first of its kind."""
        self._line = line

    @property
    def position(self) -> int:
        """Waiters before it."""
        return self._line.position(self)

    async def first(self) -> None:
        """Returns when nobody of its kind is before it, perhaps at once; another may come before it later."""
        while self._line.first_of(is_short=self.is_short) is not self:
            self.called.clear()
            await self.called.wait()


class Line:
    """Its waiters, in the order of their turns."""

    def __init__(self) -> None:
        self._places: list[Place] = []
        self._number = count()

    def first_of(self, *, is_short: bool) -> Place | None:
        """Whose turn it is among those of a kind."""
        return next((place for place in self._places if place.is_short is is_short), None)

    def position(self, place: Place) -> int:
        """Waiters before one; 0 also when it waits no more."""
        return self._places.index(place) if place in self._places else 0

    @contextmanager
    def place(self, turn: int, *, is_short: bool = False) -> Iterator[Place]:
        """Stands in line while the block runs: behind those of a lower turn, or of the same one and earlier."""
        place = Place(self, (turn, next(self._number)), is_short=is_short)
        insort(self._places, place, key=lambda one: one.turn)
        try:
            yield place
        finally:
            self._places.remove(place)
            if (first := self.first_of(is_short=is_short)) is not None:
                first.called.set()
