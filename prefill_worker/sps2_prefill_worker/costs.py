"""What a prompt costs the ranks of a group: whether it pays to share it, and whether it is short. Pure, torch-free.

Costs are FLOPs and documented rates, never measurements or load: the same prompt is always computed by as many ranks,
and rounded alike.
"""

from bisect import bisect_right
from dataclasses import dataclass
from typing import Self

from sps2.internal.v1 import engine_pb2
from sps2_engine.attention.cost_model import Estimate
from sps2_engine.attention.plan import AttentionPlan
from sps2_engine.attention.rates import Rates
from sps2_layout.block_hash import BLOCK_TOKENS

SHORT_SLICES = 2
"""A prompt of at most so many slices is short: what a longer one waits for it is still well below the time in which
a cancel frees its KV."""
WORTH_SHARING = 0.8
"""A prompt is shared where at least this part of the ranks' time is compute. Below, ranks that each compute a prompt
of their own have more done; what one gains by sharing is then a few exchanges' latency."""
LONGEST = 1 << 20
"""Tokens; no prompt is longer."""


@dataclass(frozen=True)
class PromptCosts:
    """What the ranks of a formed group say of themselves; the least of any of them."""

    num_layers: int
    linear_flops: int
    """FLOPs of one token's matrix products in all layers, on one rank."""
    slice_flops: int
    """FLOPs of a slice."""
    kv_blocks: int
    """Blocks of KV that a rank can hold."""
    kv_token_bytes: int = 0
    """KV of a token, all layers and heads of the model."""

    @classmethod
    def of(cls, ranks: list[engine_pb2.EngineLoaded]) -> Self:
        """Those of a group of these ranks."""
        return cls(
            num_layers=ranks[0].num_layers,
            linear_flops=max(loaded.linear_flops_per_token for loaded in ranks),
            slice_flops=min(loaded.slice_flops for loaded in ranks),
            kv_blocks=min(loaded.kv_blocks_total for loaded in ranks),
            kv_token_bytes=_kv_token_bytes(ranks[0]),
        )

    @property
    def short_flops(self) -> int:
        """The most that a short prompt costs its busiest rank."""
        return SHORT_SLICES * self.slice_flops

    def interlude_flops(self, plan: AttentionPlan, most_cached: int = 0) -> int:
        """What a short prompt costs its busiest rank; 0 of one that is not short.

        Args:
            plan: of what is to be computed.
            most_cached: keys before it that are cached on the rank that has most of them, which all of it sees.
        """
        if plan.most_tokens * self.linear_flops > self.short_flops:
            return 0  # to count the pairs of a long one takes long
        seen = plan.layout.num_tokens * most_cached * plan.num_q_heads
        flops = self._flops(plan) + self.num_layers * 4 * plan.head_dim * seen
        return flops if flops <= self.short_flops else 0

    def worth_sharing(
        self, alone: AttentionPlan, shared: AttentionPlan, each: Estimate, rates: Rates
    ) -> bool:
        """Whether the ranks of `shared` should do together what one of them could do by itself.

        Args:
            alone: the prompt on one rank.
            shared: the prompt on several.
            each: what a layer of `shared` takes.
            rates: of a rank.
        """
        alone_s = self._flops(alone) / rates.flops_per_s
        linear_s = shared.most_tokens * self.linear_flops / rates.flops_per_s
        shared_s = linear_s + self.num_layers * each.step_s
        return alone_s >= WORTH_SHARING * shared.num_ranks * shared_s

    def linear_s(self, num_tokens: int, rates: Rates) -> float:
        """Seconds of one rank for the matrix products of so many tokens."""
        return num_tokens * self.linear_flops / rates.flops_per_s

    def attention_s(self, num_pairs: int, num_q_heads: int, head_dim: int, rates: Rates) -> float:
        """Seconds of one rank for so many (query, key) pairs in all layers."""
        return self.num_layers * 4 * head_dim * num_q_heads * num_pairs / rates.flops_per_s

    def fits(self, num_tokens: int) -> bool:
        """Whether one rank has room for their KV."""
        return -(-num_tokens // BLOCK_TOKENS) <= self.kv_blocks

    def short_tokens(self, num_q_heads: int, head_dim: int, num_ranks: int) -> int:
        """Tokens of the longest prompt that is short under exact attention of so many heads on so many ranks.

        0 where ranks have not said what a token costs: then nothing is short.
        """
        if not self.linear_flops:
            return 0
        per_pair = 4 * head_dim * num_q_heads * self.num_layers

        def flops(num_tokens: int) -> int:
            pairs = num_tokens * (num_tokens + 1) // 2
            return (num_tokens * self.linear_flops + pairs * per_pair) // num_ranks

        return bisect_right(range(LONGEST), self.short_flops, key=flops) - 1

    def _flops(self, plan: AttentionPlan) -> int:
        pairs = max(plan.pairs(rank, 0) for rank in range(plan.num_ranks))
        return plan.most_tokens * self.linear_flops + self.num_layers * 4 * plan.head_dim * pairs


def _kv_token_bytes(loaded: engine_pb2.EngineLoaded) -> int:
    element_bytes = 2 if loaded.dtype == "bf16" and loaded.device == "cuda" else 4
    return 2 * loaded.num_layers * loaded.num_kv_heads * loaded.head_dim * element_bytes
