"""Plots of `sps2 bench decode`: throughput, time between tokens, bytes of a token."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sps2_bench.drawing import Axes, figure

Rows = Sequence[dict[str, Any]]


def write_plots(rows: Rows, folder: Path) -> list[Path]:
    """Writes the PNG files and returns their paths."""
    drawings = {"decode_throughput": _throughput, "decode_tbt": _tbt, "decode_bytes": _bytes}
    paths = []
    for name, draw in drawings.items():
        with figure(folder / f"{name}.png") as axes:
            draw(axes, rows)
        paths.append(folder / f"{name}.png")
    return paths


def _series(rows: Rows) -> dict[str, list[dict[str, Any]]]:
    series: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        what = f"moving {row['form']}" if row["program"] == "sps2" else f"{row['form']} cache"
        engine = f"{row['program']} {row['dtype']}, {what}, {engine_size(row)}"
        label = f"{engine}, batch {row['batch']}"
        series.setdefault(label, []).append(row)
    return series


def engine_size(row: dict[str, Any]) -> str:
    """Ranks x threads of each, or ranks x tensor ranks x threads."""
    tensor = f"{row['tensor']}x" if row["tensor"] > 1 else ""
    return f"{row['ranks']}x{tensor}{row['threads']}"


def _contexts(axes: Axes, rows: Rows, ylabel: str) -> None:
    contexts = sorted({row["context"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.set(xlabel="context tokens", ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _throughput(axes: Axes, rows: Rows) -> None:
    for label, points in _series(rows).items():
        axes.plot(
            [p["context"] for p in points], [p["tokens_per_s"] for p in points], marker="o", label=label
        )
    axes.set_yscale("log")
    _contexts(axes, rows, "tokens per second, all rows (median)")


def _tbt(axes: Axes, rows: Rows) -> None:
    for label, points in _series(rows).items():
        contexts = [p["context"] for p in points]
        (line,) = axes.plot(contexts, [p["tbt_p50_s"] * 1e3 for p in points], marker="o", label=label)
        late = [p["tbt_p99_s"] * 1e3 for p in points]
        axes.plot(contexts, late, color=line.get_color(), linestyle="--", linewidth=1)
    axes.plot([], [], color="grey", linestyle="--", label="99th percentile")
    axes.set_yscale("log")
    _contexts(axes, rows, "time between tokens, ms (median)")


def _bytes(axes: Axes, rows: Rows) -> None:
    moved = [row for row in rows if row["program"] == "sps2" and row["ranks"] > 1]
    for label, points in _series(moved).items():
        axes.plot(
            [p["context"] for p in points], [p["bytes_per_token"] for p in points], marker="o", label=label
        )
    axes.set_yscale("symlog")
    _contexts(axes, rows, "bytes posted for a token")
