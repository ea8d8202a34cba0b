"""Which exchange schedule serves a prompt soonest: bytes and FLOPs of each plan at measured rates. Pure.

A step of a rank takes as long as the longer of its compute and its exchanges, which overlap, and each
exchange its latency at least; a step of the group as long as its slowest rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from sps2_engine.attention.csa_plan import CsaPlan
from sps2_engine.attention.kv_schedule import KvPlan
from sps2_engine.attention.plan import AttentionPlan
from sps2_engine.attention.rates import CPU_CORE, Rates
from sps2_engine.mesh import TensorShare
from sps2_layout.layout import Layout, exact_layout

Exchange: TypeAlias = Literal["heads", "kv"]
Choice: TypeAlias = Literal["auto", "heads", "kv"]

PLANS: Mapping[Exchange, type[AttentionPlan]] = {"heads": CsaPlan, "kv": KvPlan}


WORTH_CHANGING = 0.95
"""`kv` is chosen only where it takes at most this share of the time of `heads`: less is within the model's error,
and a choice that turns on it would change with every few tokens of length."""


@dataclass(frozen=True)
class AttentionShape:
    """What of a model decides what its attention computes and moves."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    element_bytes: int
    """Bytes of an element of q, k, v and o."""
    first_kv_head: int = 0
    """Number of its first KV head in the model."""

    def of_share(self, share: TensorShare) -> "AttentionShape":
        """What a tensor rank computes of a model of this shape.

        Raises:
            ValueError: the heads cannot be split so.
        """
        kv_heads = share.kv_heads(self.num_kv_heads)
        return replace(
            self,
            num_q_heads=len(share.q_heads(self.num_q_heads)),
            num_kv_heads=len(kv_heads),
            first_kv_head=kv_heads.span.begin,
        )


@dataclass(frozen=True)
class Estimate:
    """One layer of the rank that is done last."""

    exchange: Exchange
    compute_s: float
    exchange_s: float

    @property
    def step_s(self) -> float:
        """What does not overlap is the longer one's rest."""
        return max(self.compute_s, self.exchange_s)


def make_plan(exchange: Exchange, layout: Layout, num_ranks: int, shape: AttentionShape) -> AttentionPlan:
    """The plan of one exchange schedule.

    Dense causal attention has no shards of its own, so `kv` cuts it into two to a rank: then it can fold.

    Raises:
        ValueError: see `AttentionPlan`.
    """
    if exchange == "kv" and layout.is_exact and num_ranks > 1:
        layout = exact_layout(layout.num_tokens, 2 * num_ranks)
    heads = shape.num_q_heads, shape.num_kv_heads, shape.head_dim
    return PLANS[exchange](layout, num_ranks, *heads, shape.element_bytes, first_kv_head=shape.first_kv_head)


def estimate(
    exchange: Exchange, layout: Layout, num_ranks: int, shape: AttentionShape, rates: Rates
) -> Estimate:
    """Time of a layer by one schedule, from counted bytes and FLOPs.

    A rank's exchange is as long as the more of what it sends and what it receives.
    """
    plan, ranks = make_plan(exchange, layout, num_ranks, shape), range(num_ranks)
    moved = plan.moved_bytes()
    compute, exchanged = [], []
    num_exchanges = sum(1 + plan.returns(stage) for stage in plan.stages())
    for rank in ranks:
        compute.append(4 * plan.head_dim * plan.pairs(rank, 0) / rates.flops_per_s)
        busiest = max(sum(moved[rank]), sum(row[rank] for row in moved))
        exchanged.append(busiest / rates.bytes_per_s + num_exchanges * rates.latency_s)
    slowest = max(ranks, key=lambda rank: max(compute[rank], exchanged[rank]))
    return Estimate(exchange, compute[slowest], exchanged[slowest])


def choose_schedule(
    layout: Layout, num_ranks: int, shape: AttentionShape, rates: Rates = CPU_CORE, choice: Choice = "auto"
) -> Exchange:
    """The schedule to serve a prompt by: the one asked for, or the one estimated to be clearly sooner.

    Else `heads`, which keeps consecutive tokens on a rank; so does a rank alone, which has nothing to exchange.
    """
    if num_ranks == 1:
        return "heads"
    if choice != "auto":
        return choice
    heads, kv = (estimate(name, layout, num_ranks, shape, rates) for name in PLANS)
    return kv.exchange if kv.step_s < WORTH_CHANGING * heads.step_s else heads.exchange


def plan_attention(
    layout: Layout, num_ranks: int, shape: AttentionShape, rates: Rates = CPU_CORE, choice: Choice = "auto"
) -> AttentionPlan:
    """The plan of the chosen schedule; every rank comes to the same one, `CsaSchedule` carries it out.

    Raises:
        ValueError: see `AttentionPlan`.
    """
    return make_plan(choose_schedule(layout, num_ranks, shape, rates, choice), layout, num_ranks, shape)
