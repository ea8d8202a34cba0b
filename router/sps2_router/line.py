"""A line in which turns, not arrival, say who is first. Knows nothing of what is waited for. On one event loop only."""

import asyncio
from bisect import insort
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count


class Place:
    """One waiter's."""

    def __init__(self, line: "Line", turn: tuple[int, int]) -> None:
        self.turn = turn
        self.called = asyncio.Event()
        """Set when it has become the first."""
        self._line = line

    @property
    def position(self) -> int:
        """Waiters before it."""
        return self._line.position(self)

    async def first(self) -> None:
        """Returns when nobody is before it, perhaps at once; another may come before it later."""
        while self._line.first is not self:
            self.called.clear()
            await self.called.wait()


class Line:
    """Its waiters, in the order of their turns."""

    def __init__(self) -> None:
        self._places: list[Place] = []
        self._number = count()

    @property
    def first(self) -> Place | None:
        """Whose turn it is."""
        return self._places[0] if self._places else None

    def position(self, place: Place) -> int:
        """Waiters before one; 0 also when it waits no more."""
        return self._places.index(place) if place in self._places else 0

    @contextmanager
    def place(self, turn: int) -> Iterator[Place]:
        """Stands in line while the block runs: behind those of a lower turn, or of the same one and earlier."""
        place = Place(self, (turn, next(self._number)))
        insort(self._places, place, key=lambda one: one.turn)
        try:
            yield place
        finally:
            self._places.remove(place)
            if self._places:
                self._places[0].called.set()
