"""Plots of `sps2 eval accuracy`: the curve of loss over cost, and retrieval by depth and length."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from sps2_bench.accuracy.candidates import EXACT
from sps2_bench.accuracy.results import DEPTH_BINS, ProfileResult
from sps2_bench.drawing import Axes, panels
from sps2_bench.statistics import Estimate

Results = Sequence[ProfileResult]

CURVES: tuple[tuple[str, Callable[[ProfileResult], Estimate]], ...] = (
    ("perplexity lost, continuation (%)", lambda one: _times(one.perplexity_loss, 100)),
    ("retrieval lost (points)", lambda one: _times(one.retrieval_loss, 100)),
    ("better than local-only inside the prompt (nats)", lambda one: one.repeat_gain),
    ("KL at the prompt's end (nats)", lambda one: one.kl),
)
HEAT_COLUMNS = ("one_hop", "two_hops")


def write_plots(results: Results, chosen: str | None, folder: Path) -> list[Path]:
    """Writes the PNG files and returns their paths."""
    curve, heat = folder / "accuracy_curve.png", folder / "accuracy_retrieval.png"
    with panels(curve, 2, 2, (7.0, 5.0)) as four:
        for axes, (label, figure_of) in zip(four, CURVES, strict=True):
            _curve(axes, results, chosen, label, figure_of)
    with panels(heat, len(results), len(HEAT_COLUMNS), (5.0, 1.8)) as cells:
        for index, axes in enumerate(cells):
            _heat(axes, results[index // len(HEAT_COLUMNS)], HEAT_COLUMNS[index % len(HEAT_COLUMNS)])
    return [curve, heat]


def _times(estimate: Estimate, factor: float) -> Estimate:
    return Estimate(estimate.value * factor, estimate.low * factor, estimate.high * factor)


def _curve(
    axes: Axes,
    results: Results,
    chosen: str | None,
    label: str,
    figure_of: Callable[[ProfileResult], Estimate],
) -> None:
    for one in results:
        if one.name == EXACT:
            continue
        figure, left = figure_of(one), 100 * (1 - one.flops_saved)
        # A percentile interval need not hold the value itself where samples are few.
        below, above = max(0.0, figure.value - figure.low), max(0.0, figure.high - figure.value)
        if not np.isfinite([figure.value, below, above]).all():
            continue
        color = "tab:red" if one.name == chosen else "tab:grey" if one.is_local else "tab:blue"
        axes.errorbar(left, figure.value, [[below], [above]], fmt="o", color=color, capsize=3, markersize=4)
        axes.annotate(one.name, (left, figure.value), textcoords="offset points", xytext=(4, 4), fontsize=6)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set(xlabel="attention FLOPs, % of dense", ylabel=label)
    axes.grid(alpha=0.3)


def _heat(axes: Axes, one: ProfileResult, hops: str) -> None:
    by_length = one.heat[hops]
    shares = np.full((max(1, len(by_length)), DEPTH_BINS), np.nan)
    for row, length in enumerate(sorted(by_length)):
        for depth, cell in enumerate(by_length[length]):
            if cell.asked:
                shares[row, depth] = cell.right / cell.asked
    axes.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for row, depth in zip(*np.nonzero(np.isfinite(shares)), strict=True):
        axes.text(depth, row, f"{100 * shares[row, depth]:.0f}", ha="center", va="center", fontsize=6)
    axes.set_yticks(range(len(by_length)), [f"{length:,}" for length in sorted(by_length)], fontsize=6)
    axes.set_xticks([0, DEPTH_BINS - 1], ["begin", "end"], fontsize=6)
    axes.set_title(f"{one.name}, {hops.replace('_', ' ')}, % right", fontsize=7)
