"""How many ranks compute a prompt, by which schedule, and its plan: the leader chooses, ranks follow. Torch-free.

A prompt is shared by all sequence ranks of the group, or, where that would mostly be exchanges, computed by one of them
alone: then several such prompts are computed at once.

A rank never chooses by itself: what the leader has chosen comes with the prompt, beside the tokens that it gives
the rank to host, and a rank that would plan otherwise refuses.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self, TypeAlias

from sps2.internal.v1 import engine_pb2
from sps2_engine.attention.cost_model import (
    PLANS,
    AttentionShape,
    Choice,
    Exchange,
    choose_schedule,
    estimate,
    make_plan,
)
from sps2_engine.attention.plan import AttentionPlan
from sps2_engine.attention.rates import Rates, assumed_rates
from sps2_engine.kv_transfer.rows import tensor_source
from sps2_engine.mesh import Mesh, TensorShare
from sps2_layout.attention import Attention
from sps2_layout.layout import Span
from sps2_layout.wire import unpack_attention
from sps2_prefill_worker.costs import PromptCosts

ELEMENT_BYTES: Mapping[str, int] = {"fp32": 4, "bf16": 2}
TO_WIRE: "Mapping[Exchange, engine_pb2.Exchange.ValueType]" = {
    "heads": engine_pb2.EXCHANGE_HEADS,
    "kv": engine_pb2.EXCHANGE_KV,
}
Sharing: TypeAlias = Literal["auto", "all"]
"""Which prompts all ranks of a group share: those that gain by it, or each."""
FROM_WIRE = {number: name for name, number in TO_WIRE.items()}


@dataclass(frozen=True)
class PlannedPrompt:
    """A prompt as a group computes it."""

    exchange: Exchange
    """The schedule."""
    plan: AttentionPlan
    """Of the sequence ranks that have the first part of the model; those of the others differ only in the heads."""
    mesh: Mesh
    num_replicas: int = 1
    """Tensor ranks that hold the same KV heads, and deliver each its part of the tokens."""
    alone: bool = False
    """One sequence rank computes it by itself, whichever is free; the plan is that rank's."""
    interlude_flops: int = 0
    """What a short prompt costs its busiest rank; 0 of one that is not short."""

    @property
    def most_kept(self) -> int:
        """Tokens whose KV a rank keeps until it is delivered, at most."""
        return -(-self.plan.most_tokens // self.num_replicas)

    def assign(
        self, rank: int, run: engine_pb2.RunPrefill, token_ids: Sequence[int], alone_on: int | None = None
    ) -> None:
        """Tells a rank the schedule, and which of the prompt's tokens it hosts.

        Args:
            rank: the rank.
            run: what it is told.
            token_ids: of the whole text.
            alone_on: the sequence rank that computes it by itself, of a prompt that is computed so.
        """
        run.exchange = TO_WIRE[self.exchange]
        run.interlude_flops = self.interlude_flops
        index = self.mesh.sequence_index(rank)
        if alone_on is not None:
            run.alone_on = alone_on
            if index != alone_on:
                return
            index = 0
        for span in hosted_spans(self.plan, index):
            run.spans.add(begin=span.begin, end=span.end)
            run.token_ids.extend(token_ids[span.slice])


@dataclass(frozen=True)
class PromptPlanner:
    """How a formed group plans its prompts."""

    mesh: Mesh
    model: AttentionShape
    """All heads of the model."""
    rates: Rates
    choice: Choice
    costs: PromptCosts
    sharing: Sharing

    @classmethod
    def of(
        cls,
        ranks: list[engine_pb2.EngineLoaded],
        choice: Choice,
        threads: int,
        tp: int = 1,
        sharing: Sharing = "auto",
    ) -> Self:
        """That of a group of these ranks, each with `threads` threads where it computes on a CPU, `tp` to a slice.

        Raises:
            ValueError: `tp` does not divide the group.
        """
        one = ranks[0]
        shape = AttentionShape(one.num_q_heads, one.num_kv_heads, one.head_dim, ELEMENT_BYTES[one.dtype])
        rates = assumed_rates(one.device, one.dtype, threads)
        return cls(Mesh.of(len(ranks), tp), shape, rates, choice, PromptCosts.of(ranks), sharing)

    def plan(self, attention: Attention, num_generated: int = 0) -> PlannedPrompt:
        """Chooses; counting what each schedule moves and computes takes tens of ms for 64k tokens on 8 ranks.

        Args:
            attention: of the prompt.
            num_generated: tokens behind it, from earlier attempts.

        Raises:
            ValueError: see `AttentionPlan`.
        """
        layout, shape = attention.sliced(self.mesh.sp, num_generated), self._share
        exchange = choose_schedule(layout, attention.num_ranks(self.mesh.sp), shape, self.rates, self.choice)
        planned = self._alone_if_better(self._planned(exchange, attention, num_generated), attention)
        return replace(planned, interlude_flops=self.costs.interlude_flops(planned.plan))

    def most_kept(self, attention: Attention, max_generated: int) -> int:
        """Tokens whose KV a rank keeps at most, by any schedule that may be chosen, once so many were generated.

        What was generated lies on the last shard, so a slice may have room for its prompt and not for what follows.
        """
        exchanges = PLANS if self.choice == "auto" else (self.choice,)
        return max(self._planned(one, attention, max_generated).most_kept for one in exchanges)

    @property
    def short_tokens(self) -> int:
        """Tokens of the longest prompt that may run between the slices of longer ones, by exact attention."""
        return self.costs.short_tokens(self._share.num_q_heads, self.model.head_dim, self.mesh.sp)

    def _alone_if_better(self, shared: PlannedPrompt, attention: Attention) -> PlannedPrompt:
        """The prompt on one rank, where it is short, has room there and sharing would mostly be exchanges."""
        plan, num_tokens = shared.plan, shared.plan.layout.num_tokens
        if self.sharing == "all" or plan.num_ranks == 1 or not self.costs.fits(num_tokens):
            return shared
        layout = attention.sliced(1, num_tokens - attention.num_tokens)
        alone = make_plan("heads", layout, 1, self._share)
        if not self.costs.interlude_flops(alone):
            return shared
        each = estimate(shared.exchange, plan.layout, plan.num_ranks, self._share, self.rates)
        if self.costs.worth_sharing(alone, plan, each, self.rates):
            return shared
        return replace(shared, exchange="heads", plan=alone, alone=True)

    @property
    def _share(self) -> AttentionShape:
        return self.model.of_share(TensorShare(0, self.mesh.tp))  # all tensor ranks have as much to do

    def _planned(self, exchange: Exchange, attention: Attention, num_generated: int) -> PlannedPrompt:
        num_ranks, layout = attention.num_ranks(self.mesh.sp), attention.sliced(self.mesh.sp, num_generated)
        plan = make_plan(exchange, layout, num_ranks, self._share)
        num_replicas = tensor_source(self.model.num_kv_heads, 0, self.mesh.tp).num_replicas
        return PlannedPrompt(exchange, plan, self.mesh, num_replicas)


def follow(run: engine_pb2.RunPrefill, rank: int, num_ranks: int, shape: AttentionShape) -> AttentionPlan:
    """The plan that the leader has made, for the heads of `shape` and rank `rank` of the `num_ranks` that compute it.

    Raises:
        ValueError: it names no schedule, or gives this rank other tokens than the plan does.
    """
    if run.exchange not in FROM_WIRE:
        raise ValueError(f"exchange {run.exchange} is not known here: is the leader of another release?")
    attention = unpack_attention(run.attention)
    layout = attention.sliced(num_ranks, len(run.choice.generated_token_ids))
    plan = make_plan(FROM_WIRE[run.exchange], layout, attention.num_ranks(num_ranks), shape)
    given, planned = spans_of(run), list(hosted_spans(plan, rank))
    if given != planned:
        raise ValueError(f"rank {rank} was given {given}, and plans {planned}")
    return plan


def spans_of(run: engine_pb2.RunPrefill) -> list[Span]:
    """Where a rank's tokens lie in the prompt, ascending."""
    return [Span(span.begin, span.end) for span in run.spans]


def hosted_spans(plan: AttentionPlan, rank: int) -> Iterator[Span]:
    """Those of a rank's tokens by the plan, without empty ones."""
    return (span for span in plan.spans(rank) if len(span))
