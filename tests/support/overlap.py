"""A step of attention over a link as slow as is wished, to see whether exchanges hide behind compute."""

import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from sps2_engine.attention.csa_schedule import CsaSchedule
from sps2_engine.attention.plan import AttentionPlan
from sps2_engine.attention.sliced import SegmentAttention
from sps2_engine.attention.trace import Trace
from sps2_engine.collectives import Communicator
from sps2_kernels.segment_attention import segment_attention
from support.held_link import HeldLink
from support.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
FAST_BYTES_PER_S = 1e15
"""A link that holds nothing back."""


@dataclass(frozen=True)
class Step:
    """One layer of all ranks."""

    wall_s: float
    """From when all ranks begin until the last is done."""
    link_s: float
    """How long the busiest link carried something."""
    traces: tuple[Trace, ...]


def time_step(
    plan: AttentionPlan,
    bytes_per_s: float,
    *,
    pipelined: bool,
    reps: int = 1,
    attention: SegmentAttention = segment_attention,
) -> list[Step]:
    """Runs a layer `reps` times on thread ranks of one thread each, over links of a bandwidth."""
    generator = torch.Generator().manual_seed(0)
    heads = plan.num_q_heads, plan.num_kv_heads, plan.num_kv_heads

    def on_rank(communicator: Communicator) -> list[tuple[float, float, float, Trace]]:
        torch.set_num_threads(1)  # counts for this thread alone
        num_rows = sum(len(span) for span in plan.spans(communicator.rank))
        q, k, v = (torch.randn(num_rows, count, plan.head_dim, generator=generator) for count in heads)
        return [one(communicator, q, k, v) for _ in range(reps)]

    def one(
        communicator: Communicator, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[float, float, float, Trace]:
        link, trace = HeldLink(communicator, bytes_per_s), Trace(communicator.rank)
        schedule = CsaSchedule(
            plan, link, plan.head_dim**-0.5, pipelined=pipelined, trace=trace, attention=attention
        )
        communicator.agree(1)  # begin together
        begin = time.perf_counter()
        schedule.attend(0, q, k, v)
        return begin, time.perf_counter(), link.busy_s, trace

    steps = []
    for ranks in zip(*run_ranks(plan.num_ranks, on_rank), strict=True):
        begins, ends, busy, traces = zip(*ranks, strict=True)
        steps.append(Step(max(ends) - min(begins), max(busy), traces))
    return steps


@dataclass(frozen=True)
class Overlap:
    """Medians of a layer's time with its exchanges as long as a share of its compute."""

    compute_s: float
    """Alone, over a link that holds nothing back."""
    link_s: float
    pipelined_s: float
    plain_s: float

    @property
    def to_longer(self) -> float:
        """The pipelined step over the longer of compute and link."""
        return self.pipelined_s / max(self.compute_s, self.link_s)

    @property
    def to_sum(self) -> float:
        """The plain step over their sum."""
        return self.plain_s / (self.compute_s + self.link_s)


def measure_overlap(plan: AttentionPlan, share: float, reps: int, attention: SegmentAttention) -> Overlap:
    """Times compute alone, then the step with links so slow that they are busy for `share` of it.

    The three are taken in turn, so that a machine that slows down meanwhile slows all of them.
    """
    links: list[float] = []
    walls: tuple[list[float], ...] = [], [], []
    for _ in range(reps):
        alone = time_step(plan, FAST_BYTES_PER_S, pipelined=True, reps=2, attention=attention)[-1]
        rate = FAST_BYTES_PER_S * alone.link_s / (share * alone.wall_s)
        on, off = (
            time_step(plan, rate, pipelined=pipelined, reps=2, attention=attention)[-1]
            for pipelined in (True, False)
        )
        links.append(on.link_s)
        for wall, step in zip(walls, (alone, on, off), strict=True):
            wall.append(step.wall_s)
    compute_s, pipelined_s, plain_s = (statistics.median(wall) for wall in walls)
    return Overlap(compute_s, statistics.median(links), pipelined_s, plain_s)


def draw_timeline(source: Path, target: Path) -> None:
    """Draws a trace's JSON as a PNG, in a process of its own as a user would."""
    program = [sys.executable, str(ROOT / "scripts" / "draw_timeline.py"), str(source), str(target)]
    subprocess.run(program, check=True, timeout=120)


def check_order(plan: AttentionPlan, trace: Trace) -> None:
    """Every exchange in is posted before anything is computed, and waited for once compute has begun."""
    compute = [event for event in trace.events if event.kind == "compute"]
    posts = {event.name: event for event in trace.events if event.kind == "post"}
    waits = {event.name: event for event in trace.events if event.kind == "wait"}
    first, across = compute[0], [event for event in compute if event.name.startswith("across")]
    for stage, event in zip(plan.stages(), across, strict=True):
        assert posts[f"in {stage}"].end_s <= first.begin_s
        assert first.end_s <= waits[f"in {stage}"].begin_s
        assert waits[f"in {stage}"].end_s <= event.begin_s
        if plan.returns(stage):
            assert event.end_s <= posts[f"out {stage}"].begin_s
            assert waits[f"out {stage}"].begin_s >= compute[-1].end_s
    last_posted = max(post.end_s for post in posts.values())
    assert any(event.begin_s >= last_posted for event in compute), "nothing hides the last exchange"


def sleeping_attention(flops_per_s: float) -> SegmentAttention:
    """Attention that takes the time of its FLOPs and no core: as if each rank had a device of its own."""

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_off: int, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        del v, scale
        pairs = q.shape[0] * k.shape[0] * q.shape[1] / (2 if q_off == 0 else 1)
        time.sleep(4 * q.shape[2] * pairs / flops_per_s)
        return torch.zeros_like(q), torch.zeros(q.shape[:2])

    return attend
