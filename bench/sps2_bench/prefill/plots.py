"""Plots of `sps2 bench prefill`: time, speed-up beside its floor, memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sps2_bench.drawing import Axes, figure

Rows = Sequence[dict[str, Any]]


def write_plots(rows: Rows, folder: Path) -> list[Path]:
    """Writes the PNG files and returns their paths."""
    drawings = {"prefill_ttft": _ttft, "prefill_speedup": _speedup, "prefill_memory": _memory}
    paths = []
    for name, draw in drawings.items():
        with figure(folder / f"{name}.png") as axes:
            draw(axes, rows)
        paths.append(folder / f"{name}.png")
    return paths


def _series(rows: Rows) -> dict[str, list[dict[str, Any]]]:
    series: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        label = f"{row['program']} {row['dtype']} {row['profile']}, {row['ranks']}x{row['threads']}"
        series.setdefault(label, []).append(row)
    return series


def _lengths(axes: Axes, rows: Rows, ylabel: str) -> None:
    lengths = sorted({row["length"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set(xlabel="prompt tokens", ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _ttft(axes: Axes, rows: Rows) -> None:
    for label, points in _series(rows).items():
        axes.plot([p["length"] for p in points], [p["ttft_s"] for p in points], marker="o", label=label)
    axes.set_yscale("log")
    _lengths(axes, rows, "time to first token, s (median)")


def _speedup(axes: Axes, rows: Rows) -> None:
    for label, points in _series([row for row in rows if row["floor_speedup"]]).items():
        lengths = [p["length"] for p in points]
        (line,) = axes.plot(lengths, [p["speedup"] for p in points], marker="o", label=label)
        floors = [p["floor_speedup"] for p in points]
        axes.plot(lengths, floors, color=line.get_color(), linestyle="--", linewidth=1)
    axes.plot([], [], color="grey", linestyle="--", label="allowed by FLOPs")
    _lengths(axes, rows, "times faster than exact attention")


def _memory(axes: Axes, rows: Rows) -> None:
    for label, points in _series(rows).items():
        grown = [(p["peak_rss"] - p["rss_before"]) / 2**20 for p in points]
        axes.plot([p["length"] / p["ranks"] for p in points], grown, marker="o", label=label)
    axes.set(xlabel="prompt tokens per rank", ylabel="peak memory above the loaded model, MiB per rank")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
