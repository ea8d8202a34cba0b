"""What control costs the leader of a decode group, against what its steps take. Knows no clock: it is told."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NUM_STEPS = 200
"""Steps that are looked back at."""


class ControlTime:
    """Seconds of control and of steps, over the last steps."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._spent_s = 0.0
        self._steps: deque[tuple[float, float]] = deque(maxlen=NUM_STEPS)

    @contextmanager
    def spent(self) -> Iterator[None]:
        """What is done inside is control; must not wait, nor be nested."""
        began = self._clock()
        try:
            yield
        finally:
            self._spent_s += self._clock() - began

    def step(self, step_s: float) -> None:
        """A step has ended that took so long; control since the one before is its own."""
        self._steps.append((self._spent_s, step_s))
        self._spent_s = 0.0

    @property
    def share(self) -> float:
        """Seconds of control for each second of steps; 0 before the first step."""
        steps_s = sum(step_s for _, step_s in self._steps)
        return sum(spent_s for spent_s, _ in self._steps) / steps_s if steps_s else 0.0
