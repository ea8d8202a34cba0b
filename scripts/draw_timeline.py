"""Draws a Chrome trace of `sps2_engine.attention.trace` as a timeline.

    python scripts/draw_timeline.py trace.json timeline.png

One row of compute and waiting and two of exchanges under way for each rank.
"""

import json
import sys
from pathlib import Path
from typing import Any

COLOURS = {"compute": "tab:blue", "wait": "tab:red", "post": "tab:orange"}
IN_COLOUR, OUT_COLOUR = "tab:green", "tab:purple"
MS_PER_US = 1e-3


def draw(trace: dict[str, Any], path: Path) -> None:
    """Writes the PNG of a trace as `chrome_trace` makes it."""
    from matplotlib.figure import Figure  # noqa: PLC0415 # a library of development, not of serving

    rows: list[dict[str, Any]] = trace["traceEvents"]
    ranks = sorted({row["pid"] for row in rows})
    figure = Figure(figsize=(12, 1 + 1.6 * len(ranks)), layout="tight")
    axes = figure.subplots()
    begins: dict[str, float] = {}
    for row in rows:
        rank = row["pid"]
        if row["ph"] == "X":
            bar = (row["ts"] * MS_PER_US, row["dur"] * MS_PER_US)
            axes.broken_barh(
                [bar], (-2 * rank, 0.8), color=COLOURS[row["cat"]], edgecolor="white", linewidth=0.3
            )
        elif row["ph"] == "b":
            begins[row["id"]] = row["ts"]
        elif row["ph"] == "e":
            begin, inward = begins[row["id"]], row["name"].startswith("in")
            bar = (begin * MS_PER_US, (row["ts"] - begin) * MS_PER_US)
            place = (-2 * rank - (0.45 if inward else 0.85), 0.35)
            axes.broken_barh([bar], place, color=IN_COLOUR if inward else OUT_COLOUR, alpha=0.35)
    axes.set_yticks(
        [y - 2 * rank for rank in ranks for y in (0.4, -0.28, -0.68)],
        [f"{name} {rank}" for rank in ranks for name in ("rank", "in", "out")],
    )
    for name, colour in {**COLOURS, "in under way": IN_COLOUR, "out under way": OUT_COLOUR}.items():
        axes.plot([], [], color=colour, linewidth=6, label=name)
    axes.legend(ncols=5, loc="upper center", bbox_to_anchor=(0.5, 1.25), frameon=False)
    axes.set_xlabel("ms")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Reads and draws what the command line names."""
    source, target = map(Path, sys.argv[1:3])
    draw(json.loads(source.read_text(encoding="utf-8")), target)


if __name__ == "__main__":
    main()
