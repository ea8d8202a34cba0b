"""Must show 3: exchanges hide behind compute.

Two ways of compute: a stand-in that sleeps for its FLOPs, as if each rank had a device of its own (who else
uses the cores matters little), and the real kernel with a core for each rank.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from sps2_engine.attention.csa_plan import CsaPlan
from sps2_engine.attention.plan import AttentionPlan
from sps2_engine.attention.sliced import SegmentAttention
from sps2_engine.attention.trace import write_chrome_trace
from sps2_kernels.segment_attention import segment_attention
from sps2_layout.layout import exact_layout
from sps2_layout.profiles import Profile, paper_profile
from support.bench import sps2_json
from support.must_show import MustShow
from support.overlap import draw_timeline, measure_overlap, sleeping_attention, time_step

pytestmark = pytest.mark.acceptance

HEADS = (8, 2, 64)
SHARES = (0.5, 1.0, 2.0)
MOST_OF_LONGER, LEAST_OF_SUM = 1.15, 0.95
SLEEPING_FLOPS_PER_S = 4e10
REPS = 3
PREFILL_TIMEOUT_S = 1_200


def plan_of(layout_name: str) -> AttentionPlan:
    """8,192 tokens on two ranks, in chunks."""
    layouts = {
        "exact": exact_layout(8_192, 2),
        "dense queries": Profile(2, ((1, 1), (2, 4)), dense_queries=True).resolve(8_192),
        "paper": paper_profile(2).resolve(8_192),
    }
    return CsaPlan(layouts[layout_name], 2, *HEADS, 4, chunk_bytes=1 << 17)


@pytest.mark.parametrize("compute", ["sleeping", "real"])
@pytest.mark.parametrize("layout_name", ["exact", "dense queries"])
@pytest.mark.parametrize("share", SHARES)
def test_step(must_show: MustShow, compute: str, layout_name: str, share: float) -> None:
    with must_show(f"3 overlap, {layout_name}, {compute} compute, communication {share} x") as figures:
        forms: dict[str, SegmentAttention] = {
            "sleeping": sleeping_attention(SLEEPING_FLOPS_PER_S),
            "real": segment_attention,
        }
        found = measure_overlap(plan_of(layout_name), share, REPS, forms[compute])
        figures += [
            f"compute {found.compute_s:.3f} s, link {found.link_s:.3f} s",
            f"pipelined {found.pipelined_s:.3f} s = {found.to_longer:.2f} x the longer",
            f"plain {found.plain_s:.3f} s = {found.to_sum:.2f} x the sum",
        ]
        assert found.to_longer <= MOST_OF_LONGER
        assert found.to_sum >= LEAST_OF_SUM


def test_timeline(must_show: MustShow, repo_root: Path) -> None:
    with must_show("3 timeline of a layer") as figures:
        out = repo_root / ".out" / "csa"
        out.mkdir(parents=True, exist_ok=True)
        plan = plan_of("exact")
        alone = time_step(plan, 1e15, pipelined=True, reps=2)[-1]
        rate = 1e15 * alone.link_s / alone.wall_s
        step = time_step(plan, rate, pipelined=True, reps=2)[-1]
        write_chrome_trace(out / "layer.json", step.traces)
        draw_timeline(out / "layer.json", out / "layer.png")
        figures.append(f"{out / 'layer.json'}, {out / 'layer.png'}")


def test_timeline_of_a_prefill(must_show: MustShow, repo_root: Path) -> None:
    """The one of docs/prefill.md; each rank computes while exchanges are under way."""
    with must_show("3 timeline of a real prefill, 32k tokens on 2 ranks") as figures:
        out = repo_root / ".out" / "csa" / "timeline"
        options = ["--lengths", "32k", "--profiles", "default", "--ranks", "2", "--repeat", "1"]
        sps2_json("bench", "prefill", *options, "--timeline", out, timeout_s=PREFILL_TIMEOUT_S)
        document = json.loads((out / "timeline_32768_default_2_fp32.json").read_text(encoding="utf-8"))
        for rank in (0, 1):
            under_way, hidden = hidden_us(document["traceEvents"], rank)
            figures.append(
                f"rank {rank}: {hidden / under_way:.0%} of {under_way / 1e6:.2f} s of exchanges hidden"
            )
            assert hidden > 0
        figures.append(str(out))


def hidden_us(events: list[dict[str, Any]], rank: int) -> tuple[float, float]:
    """Microseconds that exchanges were under way, summed up over exchanges, and during how many the rank computed."""
    own = [event for event in events if event["pid"] == rank]
    begins = {event["id"]: event["ts"] for event in own if event["ph"] == "b"}
    flights = [(begins[event["id"]], event["ts"]) for event in own if event["ph"] == "e"]
    compute = [
        (event["ts"], event["ts"] + event["dur"])
        for event in own
        if event["ph"] == "X" and event["cat"] == "compute"
    ]
    hidden = sum(
        max(0.0, min(end, over) - max(begin, start)) for begin, end in flights for start, over in compute
    )
    return sum(end - begin for begin, end in flights), hidden
