"""Files of what the ranks of a case did when: a Chrome trace of all of it, a PNG of two layers."""

from collections.abc import Sequence
from pathlib import Path

from sps2_bench.prefill.cases import Case
from sps2_bench.timeline import draw_timeline
from sps2_engine.attention.trace import Trace, chrome_trace, write_chrome_trace

NUM_DRAWN = 2
"""Layers that a page shows readably."""


def write_timeline(case: Case, traces: Sequence[Trace], folder: Path) -> list[Path]:
    """Writes the JSON and the PNG of one prefill into a folder, which is made; returns their paths."""
    engine = case.engine
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"timeline_{case.length}_{case.profile}_{engine.ranks}_{engine.dtype}.json"
    write_chrome_trace(path, traces)
    last = max(event.layer for trace in traces for event in trace.events)
    first = max(0, (last + 1 - NUM_DRAWN) // 2)
    layers = range(first, min(last + 1, first + NUM_DRAWN))
    title = (
        f"{case.length:,} tokens, {case.profile}, {engine.dtype}, {engine.ranks} ranks; "
        f"layers {', '.join(map(str, layers))} of {last + 1}"
    )
    drawing = path.with_suffix(".png")
    draw_timeline(chrome_trace(traces), drawing, layers, title)
    return [path, drawing]
