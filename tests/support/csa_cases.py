"""CSA over thread ranks, its oracle, and the layouts that the tests of plans and schedules share."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from sps2_engine.attention.csa_plan import CsaPlan
from sps2_engine.attention.csa_schedule import KIND, CsaSchedule
from sps2_engine.attention.kv_schedule import KvPlan
from sps2_engine.attention.plan import AttentionPlan
from sps2_engine.collectives import Communicator
from sps2_kernels import reference
from sps2_layout.layout import Layout
from sps2_layout.profiles import Profile, paper_profile
from support.ranks import run_ranks

HEAD_DIM = 16
SCALE = HEAD_DIM**-0.5
ELEMENT_BYTES = 4

PROFILES = {
    "exact": Profile(8, ((1, 1), (8, 1))),
    "paper": paper_profile(8),
    "two levels, tail, sinks": Profile(8, ((1, 1), (2, 2), (8, 4)), sinks=3, tail=5),
    "dense queries": Profile(8, ((1, 1), (4, 2), (8, 4)), dense_queries=True, sinks=1, tail=2),
    "local only": Profile(8, ((1, 1),), sinks=4, tail=9),
    "unseen groups": Profile(8, ((1, 1), (4, 2)), tail=3),
    "long tail, long sinks": Profile(8, ((1, 1), (8, 4)), sinks=50, tail=60),
}
PLANS: dict[str, type[AttentionPlan]] = {"heads": CsaPlan, "kv": KvPlan}

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Outcome:
    """Attention of a whole prompt by all ranks."""

    o: torch.Tensor
    """[tokens, q_heads, head_dim]."""
    posted: list[int]
    """Bytes that each rank posted."""


def draw(num_tokens: int, num_q_heads: int, num_kv_heads: int) -> Inputs:
    """Random q, k, v of a whole prompt."""
    generator = torch.Generator().manual_seed(num_tokens)
    heads = (num_q_heads, num_kv_heads, num_kv_heads)
    q, k, v = (torch.randn(num_tokens, count, HEAD_DIM, generator=generator) for count in heads)
    return q, k, v


def run_plan(
    plan: AttentionPlan,
    layer: int,
    inputs: Inputs,
    *,
    pipelined: bool = True,
    wrap: Callable[[Communicator], Communicator] = lambda communicator: communicator,
) -> Outcome:
    """Attention of the whole prompt by all ranks of a plan, each given its own tokens."""
    tokens = [
        torch.cat([torch.arange(span.begin, span.end) for span in plan.spans(rank)])
        for rank in range(plan.num_ranks)
    ]

    def on_rank(communicator: Communicator) -> tuple[torch.Tensor, int]:
        schedule = CsaSchedule(plan, wrap(communicator), SCALE, pipelined=pipelined)
        q, k, v = (x[tokens[communicator.rank]] for x in inputs)
        return schedule.attend(layer, q, k, v), communicator.bytes_posted[KIND]

    results = run_ranks(plan.num_ranks, on_rank)
    o = torch.empty_like(inputs[0])
    for own, (part, _) in zip(tokens, results, strict=True):
        o[own] = part
    return Outcome(o, [posted for _, posted in results])


def mask(layout: Layout, kv_head: int, layer: int) -> torch.Tensor:
    """The definition's mask of a layout, [queries, keys] bool."""
    return reference.csa_mask_of_ranges(
        layout.num_tokens,
        layout.shard_tokens,
        [(level.group, level.stride) for level in layout.levels],
        kv_head,
        layer,
        dense_queries=layout.dense_queries,
        sinks=layout.sinks,
        tail=layout.tail,
    )


def mask_pairs(layout: Layout, num_q_heads: int, num_kv_heads: int, layer: int) -> int:
    """Visible (query, key, query head) triples of a layer by the mask."""
    fold, stride = num_q_heads // num_kv_heads, layout.levels[-1].stride
    return fold * sum(_mask_sum(layout, (kv_head + layer) % stride) for kv_head in range(num_kv_heads))


@cache
def _mask_sum(layout: Layout, phase: int) -> int:
    """Every stride divides the last, so heads and layers of equal phase have equal masks."""
    return int(mask(layout, phase, 0).sum())


def oracle(layout: Layout, layer: int, inputs: Inputs) -> torch.Tensor:
    """Attention under the mask in fp64, [tokens, q_heads, head_dim]."""
    q, k, v = inputs
    fold = q.shape[1] // k.shape[1]
    outputs = []
    for kv_head in range(k.shape[1]):
        heads, kv = slice(kv_head * fold, (kv_head + 1) * fold), slice(kv_head, kv_head + 1)
        visible = mask(layout, kv_head, layer)
        outputs.append(reference.masked_attention(q[:, heads], k[:, kv], v[:, kv], visible, SCALE)[0])
    return torch.cat(outputs, dim=1)


def closed_forms(plan: CsaPlan) -> tuple[float, float]:
    """FLOPs and bytes per layer, mean per rank, of schedule `heads` (`attention.md`)."""
    layout, p = plan.layout, plan.num_ranks
    n, a, hq, d = layout.num_shards, layout.shard_tokens, plan.num_q_heads, plan.head_dim
    b, s = plan.element_bytes, layout.num_tokens
    flops, moved = float(a * (a + 1)), 0.0
    for lower, level in zip(layout.levels, layout.levels[1:], strict=False):
        q = 1.0 if layout.dense_queries else 1 / level.stride
        flops += a * a * level.group * (1 - lower.group / level.group) * q / level.stride
        big, small = max(1, level.group * p // n), max(1, lower.group * p // n)
        per_token = q * hq * (2 * b * d + 4) + 2 * b * d * max(plan.num_kv_heads, big) / level.stride
        moved += (1 - 1 / big) * (1 - small / big) * (s / p) * per_token
    return n / p * 2 * d * hq * flops, moved
