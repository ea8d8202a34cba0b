"""The three phases overlap: the events stand in the right order, and a slow link holds completions only.

How much time it saves is `make acceptance SUITE=csa`.
"""

import json
import time
from pathlib import Path

import pytest
import torch

from sps2_engine.attention.csa_plan import CsaPlan
from sps2_engine.attention.kv_schedule import KvPlan
from sps2_engine.attention.trace import write_chrome_trace
from sps2_engine.collectives import Communicator
from sps2_layout.profiles import Profile
from support.held_link import HeldLink
from support.overlap import FAST_BYTES_PER_S, check_order, draw_timeline, time_step
from support.ranks import run_ranks

TINY_CHUNKS = 1_000
PLANS = {
    name: kind(Profile(4, ((1, 1), (4, 2)), tail=5).resolve(400), 2, 8, 4, 16, 4, TINY_CHUNKS)
    for name, kind in (("heads", CsaPlan), ("kv", KvPlan))
}


@pytest.mark.parametrize("name", PLANS)
def test_events_stand_in_the_order_of_the_phases(name: str) -> None:
    plan = PLANS[name]
    assert len(plan.stages()) > 2
    (step,) = time_step(plan, FAST_BYTES_PER_S, pipelined=True)
    for trace in step.traces:
        check_order(plan, trace)


def test_without_the_pipeline_every_exchange_is_waited_for_at_its_post() -> None:
    (step,) = time_step(PLANS["heads"], FAST_BYTES_PER_S, pipelined=False)
    for trace in step.traces:
        exchanges = [event for event in trace.events if event.kind in {"post", "wait"}]
        assert [event.kind for event in exchanges] == ["post", "wait"] * (len(exchanges) // 2)


def test_a_timeline_is_written_and_drawn(tmp_path: Path) -> None:
    (step,) = time_step(PLANS["heads"], FAST_BYTES_PER_S, pipelined=True)
    write_chrome_trace(tmp_path / "trace.json", step.traces)
    document = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))
    phases = {row["ph"] for row in document["traceEvents"]}
    assert phases == {"M", "X", "b", "e"}
    draw_timeline(tmp_path / "trace.json", tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").stat().st_size > 1_000


def test_a_held_link_holds_the_completion_not_the_caller() -> None:
    """1,000 bytes at 2 kB/s: posted at once, there 0.5 s later; the second queues behind the first."""

    def on_rank(communicator: Communicator) -> tuple[float, float, float]:
        link, sizes = HeldLink(communicator, 2e3), [0, 0]
        sizes[1 - link.rank] = 1_000
        begin = time.perf_counter()
        sent = torch.zeros(1_000, dtype=torch.uint8)
        first, second = (link.all_to_all(sent, sizes, sizes, "test") for _ in range(2))
        posted = time.perf_counter()
        first.wait()
        middle = time.perf_counter()
        second.wait()
        return posted - begin, middle - begin, time.perf_counter() - begin

    for posted_s, first_s, second_s in run_ranks(2, on_rank):
        assert posted_s < 0.5 <= first_s < second_s
        assert second_s >= 1.0
