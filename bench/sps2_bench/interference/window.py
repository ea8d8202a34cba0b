"""Tokens of running decodes over time, and what is counted of them. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Literal, TypeAlias

import numpy as np

Disturbance: TypeAlias = Literal["quiet", "control", "prefill"]

QUIET: Disturbance = "quiet"
CONTROL: Disturbance = "control"
PREFILL: Disturbance = "prefill"
MEASURES = ("p50", "p90", "p99", "mean", "longest")


@dataclass(frozen=True)
class Case:
    """A program and what happens to it."""

    program: str
    """ "sps2", or "sarathi"."""
    chunk: int
    """Most tokens of a step of the baseline; 0 for sps2."""
    disturbance: Disturbance

    @property
    def undisturbed(self) -> "Case":
        """The same without the disturbance."""
        return replace(self, disturbance=QUIET)

    @property
    def name(self) -> str:
        """For tables and plots."""
        return f"{self.program} {self.chunk}" if self.chunk else self.program


@dataclass(frozen=True)
class Window:
    """One run of a case: when tokens came, in seconds of one clock, and the span that counts."""

    rows: tuple[tuple[float, ...], ...]
    """For each decode when its tokens came, some before the span and some after it."""
    begin: float
    """When the disturbance began."""
    end: float
    """When it was over: for a prompt, when its first token came, its KV being in the decode ranks."""
    ttft_s: float | None = None
    """Of the prompt that arrived."""

    def gaps(self) -> list[float]:
        """Times between tokens of a decode, both within the span, all decodes together."""
        return [
            later - earlier
            for row in self.rows
            for earlier, later in pairwise(row)
            if self.begin <= earlier and later <= self.end
        ]

    def series(self) -> list[tuple[float, float]]:
        """(seconds since the span's begin, time since the token before) of every token but the first ones."""
        return sorted(
            (later - self.begin, later - earlier) for row in self.rows for earlier, later in pairwise(row)
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of one decode in the span, of the one with fewest."""
        return min(sum(self.begin <= at <= self.end for at in row) for row in self.rows)

    def measures(self) -> dict[str, float]:
        """Time between tokens in seconds, by `MEASURES`.

        Raises:
            ValueError: the span is too short for a single gap.
        """
        gaps = np.array(self.gaps())
        if not len(gaps):
            raise ValueError("no decode has two tokens within the span")
        p50, p90, p99 = np.quantile(gaps, [0.5, 0.9, 0.99])
        values = (p50, p90, p99, gaps.mean(), gaps.max())
        return {name: float(value) for name, value in zip(MEASURES, values, strict=True)}


Rounds = Sequence[dict[Case, Window]]
"""Each round runs every case once."""


def document(rounds: Rounds, case: Case) -> dict[str, object]:
    """A case's row: medians over the rounds, ratios being taken within each round."""
    measured = [one[case].measures() for one in rounds]
    ttfts = [window.ttft_s for one in rounds if (window := one[case]).ttft_s is not None]
    return {
        "program": case.program,
        "chunk": case.chunk or None,
        "disturbance": case.disturbance,
        "num_gaps": sum(len(one[case].gaps()) for one in rounds),
        **{f"tbt_{name}_s": median(one[name] for one in measured) for name in MEASURES},
        **{f"raise_{name}": median(_raises(rounds, case, name)) for name in MEASURES},
        "raise_all_p50": _raises(rounds, case, "p50"),
        "raise_all_mean": _raises(rounds, case, "mean"),
        "ttft_s": median(ttfts) if ttfts else None,
    }


def beyond_control(rounds: Rounds, measure: str) -> float:
    """By how much more the prefill raises the time between tokens than the control does, of the quiet time.

    0.1 where the prefill raises it by 25% and the control by 15%. The median over the rounds.
    """
    prefill, control = (_raises(rounds, Case("sps2", 0, what), measure) for what in (PREFILL, CONTROL))
    return median(one - other for one, other in zip(prefill, control, strict=True))


def _raises(rounds: Rounds, case: Case, measure: str) -> list[float]:
    """For each round: disturbed over undisturbed, minus one."""
    return [one[case].measures()[measure] / one[case.undisturbed].measures()[measure] - 1 for one in rounds]
