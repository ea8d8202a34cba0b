"""Which exchange schedule serves a prompt, and its plan: the leader chooses, every rank follows. Torch-free.

A rank never chooses by itself: what the leader has chosen comes with the prompt, beside the tokens that it gives
the rank to host, and a rank that would plan otherwise refuses.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from sps2.internal.v1 import engine_pb2
from sps2_engine.attention.cost_model import AttentionShape, Choice, Exchange, choose_schedule, make_plan
from sps2_engine.attention.plan import AttentionPlan
from sps2_engine.attention.rates import Rates, assumed_rates
from sps2_layout.attention import Attention
from sps2_layout.layout import Span
from sps2_layout.wire import unpack_attention

ELEMENT_BYTES: Mapping[str, int] = {"fp32": 4, "bf16": 2}
TO_WIRE: "Mapping[Exchange, engine_pb2.Exchange.ValueType]" = {
    "heads": engine_pb2.EXCHANGE_HEADS,
    "kv": engine_pb2.EXCHANGE_KV,
}
FROM_WIRE = {number: name for name, number in TO_WIRE.items()}


@dataclass(frozen=True)
class PlannedPrompt:
    """A prompt as a group computes it."""

    exchange: Exchange
    """The schedule."""
    plan: AttentionPlan

    def assign(self, rank: int, run: engine_pb2.RunPrefill, token_ids: Sequence[int]) -> None:
        """Tells a rank the schedule, and which of the prompt's tokens it hosts."""
        run.exchange = TO_WIRE[self.exchange]
        for span in hosted_spans(self.plan, rank):
            run.spans.add(begin=span.begin, end=span.end)
            run.token_ids.extend(token_ids[span.slice])


@dataclass(frozen=True)
class PromptPlanner:
    """How a formed group plans its prompts."""

    group_size: int
    shape: AttentionShape
    rates: Rates
    choice: Choice

    @classmethod
    def of(cls, ranks: list[engine_pb2.EngineLoaded], choice: Choice, threads: int) -> Self:
        """That of a group of these ranks, each with `threads` threads where it computes on a CPU."""
        one = ranks[0]
        shape = AttentionShape(one.num_q_heads, one.num_kv_heads, one.head_dim, ELEMENT_BYTES[one.dtype])
        return cls(len(ranks), shape, assumed_rates(one.device, one.dtype, threads), choice)

    def plan(self, attention: Attention) -> PlannedPrompt:
        """Chooses; counting what each schedule moves and computes takes tens of ms for 64k tokens on 8 ranks.

        Raises:
            ValueError: see `AttentionPlan`.
        """
        num_ranks, layout = attention.num_ranks(self.group_size), attention.sliced(self.group_size)
        exchange = choose_schedule(layout, num_ranks, self.shape, self.rates, self.choice)
        return PlannedPrompt(exchange, make_plan(exchange, layout, num_ranks, self.shape))


def follow(run: engine_pb2.RunPrefill, rank: int, group_size: int, shape: AttentionShape) -> AttentionPlan:
    """The plan that the leader has made.

    Raises:
        ValueError: it names no schedule, or gives this rank other tokens than the plan does.
    """
    if run.exchange not in FROM_WIRE:
        raise ValueError(f"exchange {run.exchange} is not known here: is the leader of another release?")
    attention = unpack_attention(run.attention)
    plan = make_plan(
        FROM_WIRE[run.exchange], attention.sliced(group_size), attention.num_ranks(group_size), shape
    )
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
