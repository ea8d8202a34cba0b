"""Draws what `sps2_engine.attention.trace` wrote: for each rank compute, exchanges under way, waits.

Knows nothing of how it came about; reads the Chrome trace, so that a file from anywhere can be drawn.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sps2_bench.drawing import Axes, panels

TraceDocument = dict[str, list[dict[str, Any]]]

LANES = ("compute", "in", "out", "wait")
"""Of each rank, from top to bottom."""
COLOURS = {
    "attention": "tab:blue",
    "linear layers": "lightsteelblue",
    "post": "tab:orange",
    "in under way": "tab:green",
    "out under way": "tab:purple",
    "wait": "tab:red",
}
MS_PER_US = 1e-3
LANE_HEIGHT = 0.85
RANK_HEIGHT = len(LANES) + 0.6


@dataclass(frozen=True)
class _Bar:
    rank: int
    lane: str
    legend: str
    """A key of `COLOURS`."""
    begin_ms: float
    end_ms: float


def draw_timeline(trace: TraceDocument, path: Path, layers: Sequence[int] = (), title: str = "") -> None:
    """Writes the PNG of a trace.

    Args:
        trace: as `chrome_trace` makes it.
        path: of the PNG.
        layers: draw these alone, from their first event to their last; none: everything.
        title: above the drawing.

    Raises:
        ValueError: the trace has no events (of these layers).
    """
    bars = list(_bars(row for row in trace["traceEvents"] if not layers or _layer(row) in layers))
    if not bars:
        raise ValueError("the trace has no events to draw")
    ranks = sorted({bar.rank for bar in bars})
    with panels(path, 1, 1, (12.0, 1.2 + 1.1 * len(ranks))) as (axes,):
        start = min(bar.begin_ms for bar in bars)
        for rank in ranks:
            for index, lane in enumerate(LANES):
                bottom = -(rank * RANK_HEIGHT + index)
                _lane(axes, [bar for bar in bars if (bar.rank, bar.lane) == (rank, lane)], start, bottom)
        axes.set_yticks(
            [LANE_HEIGHT / 2 - rank * RANK_HEIGHT - index for rank in ranks for index in range(len(LANES))],
            [f"rank {rank} {lane}" for rank in ranks for lane in LANES],
        )
        for name in (name for name in COLOURS if any(bar.legend == name for bar in bars)):
            axes.plot([], [], color=COLOURS[name], linewidth=6, label=name)
        axes.legend(ncols=len(COLOURS), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
        axes.set_xlabel(f"ms{f'    {title}' if title else ''}")
        axes.margins(x=0.01)


def _layer(row: dict[str, Any]) -> int | None:
    layer: int | None = row["args"].get("layer")
    return layer


def _bars(rows: Iterable[dict[str, Any]]) -> Iterator[_Bar]:
    begins: dict[str, float] = {}
    for row in rows:
        begin = row.get("ts", 0.0) * MS_PER_US
        if row["ph"] == "b":
            begins[row["id"]] = begin
        elif row["ph"] == "e":
            lane = "in" if row["name"].startswith("in") else "out"
            yield _Bar(row["pid"], lane, f"{lane} under way", begins[row["id"]], begin)
        elif row["ph"] == "X":
            kind, end = row["cat"], begin + row["dur"] * MS_PER_US
            lane = "wait" if kind == "wait" else "compute"
            legend = {"compute": "attention", "linear": "linear layers"}.get(kind, kind)
            yield _Bar(row["pid"], lane, legend, begin, end)


def _lane(axes: Axes, bars: list[_Bar], start: float, bottom: float) -> None:
    """Bars that overlap share the lane's height."""
    ends: list[float] = []
    places: list[tuple[_Bar, int]] = []
    for bar in sorted(bars, key=lambda one: one.begin_ms):
        place = next((index for index, end in enumerate(ends) if end <= bar.begin_ms), len(ends))
        ends[place : place + 1] = [bar.end_ms]
        places.append((bar, place))
    for bar, place in places:
        height = LANE_HEIGHT / len(ends)
        below = bottom + LANE_HEIGHT - (place + 1) * height
        span = (bar.begin_ms - start, bar.end_ms - bar.begin_ms)
        axes.broken_barh([span], (below, height), color=COLOURS[bar.legend], edgecolor="white", linewidth=0.3)
