"""How many ranks compute a prompt, by which schedule, and its plan: the leader chooses, ranks follow. Torch-free.

A prompt is shared by all sequence ranks of the group, or, where that would mostly be exchanges, computed by one of them
alone: then several such prompts are computed at once.

A rank never chooses by itself: what the leader has chosen comes with the prompt, beside the tokens that it gives
the rank to host, and a rank that would plan otherwise refuses.

Behind a cached beginning the rest is planned as if it were a text of its own, under exact attention over all
sequence ranks; that it sees the beginning too is `sps2_engine.attention.continued`'s business.
"""

from collections.abc import Mapping, Sequence
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
    num_cached: int = 0
    """Tokens before those of the plan, whose KV the group holds."""
    alone: bool = False
    """One sequence rank computes it by itself, whichever is free; the plan is that rank's."""
    interlude_flops: int = 0
    """What a short prompt costs its busiest rank; 0 of one that is not short."""

    @property
    def most_kept(self) -> int:
        """Tokens whose KV a rank keeps until it is delivered, at most."""
        return -(-self.plan.most_tokens // self.num_replicas)

    def spans(self, rank: int, alone_on: int | None = None) -> list[Span]:
        """Where the tokens that a rank computes lie in the text, ascending; for `alone_on` see `assign`."""
        index = self.mesh.sequence_index(rank)
        if alone_on is not None:
            return hosted_spans(self.plan, 0, self.num_cached) if index == alone_on else []
        return hosted_spans(self.plan, index, self.num_cached)

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
        if alone_on is not None:
            run.alone_on = alone_on
        for span in self.spans(rank, alone_on):
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

    def plan(self, attention: Attention, num_tokens: int, cached: Sequence[int] = ()) -> PlannedPrompt:
        """Chooses; counting what each schedule moves and computes takes tens of ms for 64k tokens on 8 ranks.

        Args:
            attention: of the prompt.
            num_tokens: of the text: the prompt, and what was generated in earlier attempts.
            cached: leading tokens of which the group holds the KV, how many on each sequence rank.

        Raises:
            ValueError: see `AttentionPlan`.
        """
        if num_cached := sum(cached):
            num_tokens -= num_cached
            attention = Attention(num_tokens, num_tokens)
        layout, shape = attention.sliced(self.mesh.sp, num_tokens), self._share
        exchange = choose_schedule(layout, attention.num_ranks(self.mesh.sp), shape, self.rates, self.choice)
        planned = replace(self._planned(exchange, attention, num_tokens), num_cached=num_cached)
        if not num_cached:  # what is cached lies on several ranks
            planned = self._alone_if_better(planned, attention)
        most_cached = max(cached, default=0)
        return replace(planned, interlude_flops=self.costs.interlude_flops(planned.plan, most_cached))

    def most_kept(self, attention: Attention, num_tokens: int) -> int:
        """Tokens of a text whose KV a rank keeps at most, by any schedule that may be chosen.

        What was generated lies on the last shard, so a slice may have room for its prompt and not for what follows.
        """
        exchanges = PLANS if self.choice == "auto" else (self.choice,)
        return max(self._planned(one, attention, num_tokens).most_kept for one in exchanges)

    def compute_s(self, attention: Attention, tokens: Span) -> float:
        """Seconds in which the group computes these tokens of a prompt, without exchanges; at least.

        Under a sparse mask they see few keys, which are not counted.
        """
        num_ranks, costs, shape = self.mesh.sp, self.costs, self._share
        seconds = costs.linear_s(len(tokens), self.rates)
        if attention.layout is None:
            num_pairs = (tokens.end * (tokens.end + 1) - tokens.begin * (tokens.begin + 1)) // 2
            seconds += costs.attention_s(num_pairs, shape.num_q_heads, shape.head_dim, self.rates)
        return seconds / num_ranks

    @property
    def can_cache(self) -> bool:
        """Whether ranks can keep KV for later prompts: not where several hold the same heads and split the tokens."""
        return self._num_replicas == 1

    @property
    def short_tokens(self) -> int:
        """Tokens of the longest prompt that may run between the slices of longer ones, by exact attention."""
        return self.costs.short_tokens(self._share.num_q_heads, self.model.head_dim, self.mesh.sp)

    def _alone_if_better(self, shared: PlannedPrompt, attention: Attention) -> PlannedPrompt:
        """The prompt on one rank, where it is short, has room there and sharing would mostly be exchanges."""
        plan, num_tokens = shared.plan, shared.plan.layout.num_tokens
        if self.sharing == "all" or plan.num_ranks == 1 or not self.costs.fits(num_tokens):
            return shared
        layout = attention.sliced(1, num_tokens)
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

    @property
    def _num_replicas(self) -> int:
        return tensor_source(self.model.num_kv_heads, 0, self.mesh.tp).num_replicas

    def _planned(self, exchange: Exchange, attention: Attention, num_tokens: int) -> PlannedPrompt:
        num_ranks, layout = attention.num_ranks(self.mesh.sp), attention.sliced(self.mesh.sp, num_tokens)
        plan = make_plan(exchange, layout, num_ranks, self._share)
        return PlannedPrompt(exchange, plan, self.mesh, self._num_replicas)


def follow(run: engine_pb2.RunPrefill, rank: int, num_ranks: int, shape: AttentionShape) -> AttentionPlan:
    """The plan that the leader has made, for the heads of `shape` and rank `rank` of the `num_ranks` that compute it.

    Raises:
        ValueError: it names no schedule, or gives this rank other tokens than the plan does.
    """
    if run.exchange not in FROM_WIRE:
        raise ValueError(f"exchange {run.exchange} is not known here: is the leader of another release?")
    num_cached = num_cached_of(run)
    num_tokens = run.num_prompt_tokens - num_cached
    attention = Attention(num_tokens, num_tokens) if num_cached else unpack_attention(run.attention)
    layout = attention.sliced(num_ranks, num_tokens)
    plan = make_plan(FROM_WIRE[run.exchange], layout, attention.num_ranks(num_ranks), shape)
    given, planned = spans_of(run), hosted_spans(plan, rank, num_cached)
    if given != planned:
        raise ValueError(f"rank {rank} was given {given}, and plans {planned}")
    return plan


def num_cached_of(run: engine_pb2.RunPrefill) -> int:
    """Leading tokens of the text that are not computed: the group holds their KV."""
    return run.cached.parts[-1].token_end if run.cached.parts else 0


def spans_of(run: engine_pb2.RunPrefill) -> list[Span]:
    """Where a rank's tokens lie in the prompt, ascending."""
    return [Span(span.begin, span.end) for span in run.spans]


def hosted_spans(plan: AttentionPlan, rank: int, num_cached: int) -> list[Span]:
    """Those of a rank's tokens by the plan, without empty ones, behind so many that are cached."""
    return [Span(span.begin + num_cached, span.end + num_cached) for span in plan.spans(rank) if len(span)]
