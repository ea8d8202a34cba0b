"""The only door of this room to the engine's sparse attention: profiles by name, layouts, plans, schedules.

All else here says "the layout of this profile" and never touches the engine's own names.
"""

from dataclasses import replace
from typing import Literal, TypeAlias

import torch

from sps2_engine.attention.cost_model import AttentionShape, Choice, plan_attention
from sps2_engine.attention.csa_schedule import KIND, CsaSchedule
from sps2_engine.attention.plan import AttentionPlan
from sps2_engine.attention.rates import assumed_rates
from sps2_engine.attention.trace import Trace
from sps2_engine.collectives import Communicator
from sps2_engine.models import ModelConfig
from sps2_layout.layout import Layout, exact_layout
from sps2_layout.profile_file import ProfileError, load_profile
from sps2_layout.profiles import DEFAULT_TAIL, MIN_SHARD_TOKENS, NAMED, RUNG_SHARDS, Ladder, Profile

__all__ = [
    "KIND",
    "SHARD_TOKENS",
    "AttentionPlan",
    "Choice",
    "CsaSchedule",
    "Ladder",
    "Layout",
    "Profile",
    "ProfileError",
    "ProfileName",
    "attention_cost",
    "exact_layout",
    "load_profile",
    "make_plan",
    "make_schedule",
    "named_layout",
    "without_last",
]

ProfileName: TypeAlias = Literal["exact", "paper", "default", "local"]

SHARD_TOKENS = MIN_SHARD_TOKENS
"""The ladder stays dense while a shard would hold fewer tokens than this."""
LOCAL = Ladder("local", tuple(Profile(count, ((1, 1),), tail=DEFAULT_TAIL) for count in RUNG_SHARDS))
"""The default without levels; not offered to requests."""


def named_layout(
    name: ProfileName, num_tokens: int, num_ranks: int, shard_tokens: int = SHARD_TOKENS
) -> Layout:
    """The layout of a prompt by the name of its profile.

    Args:
        name: "exact", "paper", "default", or "local" (no levels, so that each shard sees itself alone).
        num_tokens: S.
        num_ranks: P; only the shards of exact attention depend on it, and those do not change the result.
        shard_tokens: the fewest tokens of a shard.
    """
    ladder = LOCAL if name == LOCAL.name else NAMED[name]
    layout = replace(ladder, min_shard_tokens=shard_tokens).resolve(num_tokens)
    return layout or exact_layout(num_tokens, num_ranks)


def without_last(layout: Layout, num_tokens: int) -> Layout:
    """The same mask without the prompt's last tokens: what the others see does not change.

    Raises:
        ValueError: fewer than one token would be left.
    """
    return replace(
        layout,
        num_tokens=layout.num_tokens - num_tokens,
        tail=max(0, layout.tail - num_tokens),
    )


def make_plan(
    layout: Layout,
    num_ranks: int,
    config: ModelConfig,
    dtype: torch.dtype,
    exchange: Choice = "heads",
    threads: int = 1,
) -> AttentionPlan:
    """The plan of one prompt on `num_ranks` CPU ranks of `threads` threads.

    Raises:
        ValueError: the ranks do not divide the layout's shards.
    """
    shape = AttentionShape(config.num_q_heads, config.num_kv_heads, config.head_dim, dtype.itemsize)
    rates = assumed_rates("cpu", "bf16" if dtype == torch.bfloat16 else "fp32", threads)
    return plan_attention(layout, num_ranks, shape, rates, exchange)


def make_schedule(plan: AttentionPlan, communicator: Communicator, trace: Trace | None = None) -> CsaSchedule:
    """The schedule that carries a plan out on this rank; a trace takes its events."""
    return CsaSchedule(plan, communicator, plan.head_dim**-0.5, trace=trace)


def attention_cost(plan: AttentionPlan, num_layers: int) -> tuple[int, int]:
    """Attention FLOPs and exchanged bytes of all ranks and layers; layers of one phase cost the same."""
    period = min(num_layers, plan.layout.levels[-1].stride)
    flops = [plan.flops_per_layer(layer) for layer in range(period)]
    moved = [plan.bytes_per_layer(layer) for layer in range(period)]
    layers = range(num_layers)
    return sum(flops[layer % period] for layer in layers), sum(moved[layer % period] for layer in layers)
