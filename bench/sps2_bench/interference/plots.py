"""Plots of `sps2 bench interference`: time between tokens while a prompt arrives, and medians and tails by case."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sps2_bench.drawing import Axes, figure, panels
from sps2_bench.interference.window import CONTROL, PREFILL, QUIET, Case, Window

COLOURS = {QUIET: "tab:green", CONTROL: "tab:orange", PREFILL: "tab:blue"}


def write_plots(windows: Mapping[Case, Window], rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Writes the PNG files and returns their paths.

    Args:
        windows: of one round.
        rows: `document` of each case.
        folder: where they go; made where needed.
    """
    over_time, bars = folder / "interference_time.png", folder / "interference_tbt.png"
    names = list(dict.fromkeys(case.name for case in windows))
    longest = max(window.end - window.begin for window in windows.values())
    slowest = max(gap for window in windows.values() for _, gap in window.series())
    with panels(over_time, len(names), 1, (10.0, 2.6)) as all_axes:
        for name, axes in zip(names, all_axes, strict=True):
            _over_time(axes, {case: one for case, one in windows.items() if case.name == name})
            axes.set(title=name, xlim=(-0.05 * longest, 1.08 * longest), ylim=(None, 2e3 * slowest))
    with figure(bars) as axes:
        _bars(axes, rows)
    return [over_time, bars]


def _over_time(axes: Axes, windows: Mapping[Case, Window]) -> None:
    for case, window in windows.items():
        points = window.series()
        axes.plot(
            [at for at, _ in points],
            [gap * 1e3 for _, gap in points],
            color=COLOURS[case.disturbance],
            linestyle="none",
            marker=".",
            markersize=2,
            label=case.disturbance,
        )
        if case.disturbance == PREFILL:
            axes.axvspan(0, window.end - window.begin, color="tab:blue", alpha=0.12, label="prefill runs")
    axes.set_yscale("log")
    axes.set(xlabel="s since the disturbance began", ylabel="ms between tokens")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="upper right", markerscale=4)


def _bars(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    places = range(len(rows))
    colours = [COLOURS[row["disturbance"]] for row in rows]
    axes.bar(places, [row["tbt_p99_s"] * 1e3 for row in rows], color=colours, alpha=0.35, label="p99")
    axes.bar(places, [row["tbt_p50_s"] * 1e3 for row in rows], color=colours, width=0.5, label="median")
    for place, row in zip(places, rows, strict=True):
        axes.annotate(f"{row['raise_p50']:+.0%}", (place, row["tbt_p50_s"] * 1e3), ha="center", va="bottom")
    labels = [f"{row['program']} {row['chunk'] or ''}\n{row['disturbance']}" for row in rows]
    axes.set_xticks(places, labels, fontsize=7)
    axes.set_yscale("log")
    axes.set(ylabel="ms between tokens: median (narrow), 99th percentile (wide)")
    axes.grid(alpha=0.3, axis="y")
