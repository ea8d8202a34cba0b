"""Medians and paired bootstrap intervals."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 2_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure with its bootstrap interval."""

    value: float
    low: float
    high: float


class Bootstrap:
    """Resamples prompts, the same way for every profile: differences are paired.

    Args:
        num_units: independent units (prompts).
        seed: of the resampling.
        num_resamples: draws.

    Raises:
        ValueError: there are no units.
    """

    def __init__(self, num_units: int, seed: int = 0, num_resamples: int = RESAMPLES) -> None:
        if num_units < 1:
            raise ValueError("nothing to resample")
        rng = np.random.default_rng(seed)
        self._draws = rng.integers(num_units, size=(num_resamples, num_units))

    def estimate(self, statistic: Callable[[Floats], Floats], sums: Floats) -> Estimate:
        """A statistic of sums over units.

        Args:
            statistic: maps [..., fields] (sums over the units of a sample) to [...].
            sums: [units, fields], what each unit adds.

        Returns:
            The value over all units, and the percentile interval of the resamples; not-a-number where the
            statistic has no value.
        """
        value = float(statistic(sums.sum(axis=0)))
        resampled = statistic(sums[self._draws].sum(axis=1))
        resampled = resampled[np.isfinite(resampled)]
        if not len(resampled):
            return Estimate(value, float("nan"), float("nan"))
        outside = (1 - CONFIDENCE) / 2
        low, high = np.quantile(resampled, [outside, 1 - outside])
        return Estimate(value, float(low), float(high))
