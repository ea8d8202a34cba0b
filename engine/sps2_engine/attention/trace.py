"""What a rank did when: events of compute, posts, waits and exchanges under way, written as a Chrome trace.

Knows nothing of tensors. Times are of the host: on a GPU they are those of launches.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["post", "wait", "compute", "linear", "flight"]
"""`compute` is attention's, `linear` all that lies between two layers' attention, and `flight` an exchange from its
post until it is complete, whatever the rank does meanwhile."""

US = 1e6
"""Chrome traces count microseconds."""


@dataclass(frozen=True)
class Event:
    """One thing that a rank did."""

    kind: Kind
    name: str
    """What was computed, or the exchange, for example "in 1.0": level 1, chunk 0."""
    layer: int
    begin_s: float
    """On the clock of `time.perf_counter`, which ranks of one machine share."""
    end_s: float


class Trace:
    """Events of one rank in the order in which they were recorded."""

    def __init__(self, rank: int, events: Sequence[Event] = ()) -> None:
        self.rank = rank
        self.events = list(events)

    @contextmanager
    def span(self, kind: Kind, name: str, layer: int) -> Iterator[None]:
        """Records what happens inside it."""
        begin = time.perf_counter()
        yield
        self.events.append(Event(kind, name, layer, begin, time.perf_counter()))


def chrome_trace(traces: Sequence[Trace]) -> dict[str, list[dict[str, object]]]:
    """The traces as Chrome's and Perfetto's JSON: a process per rank, exchanges under way as async events."""
    start = min((event.begin_s for trace in traces for event in trace.events), default=0.0)
    rows: list[dict[str, object]] = []
    for trace in traces:
        rows.append(
            {"ph": "M", "pid": trace.rank, "name": "process_name", "args": {"name": f"rank {trace.rank}"}}
        )
        for event in trace.events:
            row = _row(trace, event)
            begin, end = (event.begin_s - start) * US, (event.end_s - start) * US
            if event.kind == "flight":
                row["id"] = f"{trace.rank}.{event.layer}.{event.name}"
                rows += [{**row, "ph": "b", "ts": begin}, {**row, "ph": "e", "ts": end}]
            else:
                rows.append({**row, "ph": "X", "ts": begin, "dur": end - begin})
    return {"traceEvents": rows}


def _row(trace: Trace, event: Event) -> dict[str, object]:
    return {
        "pid": trace.rank,
        "tid": 0,
        "cat": event.kind,
        "name": event.name,
        "args": {"layer": event.layer},
    }


def write_chrome_trace(path: Path, traces: Sequence[Trace]) -> None:
    """Writes the JSON for chrome://tracing, ui.perfetto.dev and `scripts/draw_timeline.py`."""
    path.write_text(json.dumps(chrome_trace(traces)), encoding="utf-8")
