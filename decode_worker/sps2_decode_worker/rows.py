"""What one decode rank holds of each row: blocks of its KV, and at home its tokens.

Knows nothing of models, collectives or transfers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from sps2.internal.v1 import engine_pb2, placement_pb2
from sps2.v1 import generation_pb2
from sps2_engine.attention.decode_plan import DecodeRow
from sps2_engine.choice import ChoiceState
from sps2_engine.kv_pool import BLOCK_TOKENS, merge_runs, slot_runs
from sps2_layout.placement import parts


@dataclass(eq=False)
class Segment:
    """Tokens in blocks of this rank; only the last of them may not be full."""

    blocks: list[int]
    """In order; there may be more of them than the tokens need."""
    num_tokens: int

    def runs(self) -> list[tuple[int, int]]:
        """Cache slots of its tokens."""
        return slot_runs(self.blocks, self.num_tokens)

    def take_front(self, num_blocks: int) -> list[int]:
        """The first blocks, which are full; they are not its any more."""
        taken, self.blocks = self.blocks[:num_blocks], self.blocks[num_blocks:]
        self.num_tokens -= len(taken) * BLOCK_TOKENS
        return taken

    def take_last(self) -> list[int]:
        """The block that grows, and those behind it that have no tokens yet; they are not its any more."""
        kept = max(0, self.num_tokens - 1) // BLOCK_TOKENS
        taken, self.blocks = self.blocks[kept:], self.blocks[:kept]
        self.num_tokens = kept * BLOCK_TOKENS
        return taken

    def give(self, blocks: Sequence[int], num_tokens: int, *, at_front: bool = False) -> None:
        """More blocks; at the end only where its own are full."""
        self.blocks = [*blocks, *self.blocks] if at_front else [*self.blocks, *blocks]
        self.num_tokens += num_tokens


@dataclass(eq=False)
class RowState:
    """One choice's row on one rank."""

    row_id: int
    reserve: engine_pb2.ReserveRow
    """The attempt's, for all of its choices."""
    rank: int
    """This rank."""
    choice_index: int
    """The choice's, within the attempt."""
    prompt: Segment
    """Whole blocks of the prompt, one object for all rows of the attempt."""
    own: Segment
    """What no other row has: at home the end of the prompt and new tokens; elsewhere whole blocks of these."""
    source: "RowState | None" = None
    """The row that has received the end of the prompt; None for choice 0."""
    admitted: bool = False
    finished: bool = False
    """Its last token was drawn; what later steps compute for it is dropped."""
    token_ids: list[int] = field(default_factory=list)
    """At home, once admitted: what was drawn in this attempt; the next step takes the last one in."""
    choice: ChoiceState | None = None
    """At home, once admitted: its tokens so far."""
    q_exchange_bytes: int = 0
    """At home: bytes of Q exchange so far."""
    plan_row: DecodeRow = field(init=False)
    """The row as the step's plan has it."""

    def __post_init__(self) -> None:
        holders = {part.rank for part in parts(self.reserve.placement)}
        self.plan_row = DecodeRow(self.row_id, self.reserve.home, tuple(sorted(holders)))

    @property
    def is_home(self) -> bool:
        """Whether this rank runs its dense layers."""
        return self.plan_row.home == self.rank

    @property
    def blocks(self) -> list[int]:
        """All its blocks here, shared or not, in the order of its KV."""
        return [*self.prompt.blocks, *self.own.blocks]

    @property
    def num_local(self) -> int:
        """Tokens whose KV is here."""
        return self.prompt.num_tokens + self.own.num_tokens

    @property
    def at_home(self) -> ChoiceState:
        """`choice`, of an admitted row at home."""
        assert self.choice is not None, "the row is not admitted, or not at home here"
        return self.choice

    @property
    def position(self) -> int:
        """Position in the text of the token that the next step takes in."""
        return self.at_home.position - 1

    def admit(self, first_token_id: int, device: torch.device) -> None:
        """The row starts to decode with the token that prefill sampled; `device` is that of the logits."""
        self.admitted = True
        if self.is_home:
            self.begin_at_home([first_token_id], device)

    def begin_at_home(self, token_ids: Sequence[int], device: torch.device) -> None:
        """The row lives here from now on, after these tokens."""
        reserve = self.reserve
        self.choice = ChoiceState(reserve.choice, self.choice_index, reserve.num_prompt_tokens, device)
        self.token_ids = []
        for token_id in token_ids:
            self.take(token_id)

    def take(self, token_id: int) -> "generation_pb2.FinishReason.ValueType":
        """The next token has been drawn; why the row ends with it, UNSPECIFIED when it goes on."""
        self.token_ids.append(token_id)
        return self.at_home.take(token_id)

    def copied_slots(self) -> tuple[list[int], list[int]]:
        """Slots of prompt tokens that lie in a block of its own: those of the row that received them, and its own."""
        if self.source is None:
            return [], []
        return _slots(self.source.own, self.own.num_tokens), _slots(self.own, self.own.num_tokens)

    def append_slot(self) -> int:
        """Takes the next slot for a new token's KV; a finished row's is never read."""
        self.own.num_tokens += 1
        ((begin, _end),) = slot_runs(self.own.blocks, 1, self.own.num_tokens - 1)
        return begin

    def runs(self) -> list[tuple[int, int]]:
        """Cache slots of its local KV, the block that is not full last."""
        return merge_runs([*self.prompt.runs(), *self.own.runs()])


def _slots(segment: Segment, num_tokens: int) -> list[int]:
    return [slot for run in slot_runs(segment.blocks, num_tokens) for slot in range(*run)]


def num_held_blocks(placement: placement_pb2.Placement, rank: int) -> int:
    """Blocks that a rank has of what is held already."""
    tokens = sum(part.token_end - part.token_begin for part in placement.held if part.rank == rank)
    return tokens // BLOCK_TOKENS


def shard_of(placement: placement_pb2.Placement, rank: int) -> placement_pb2.ShardPlacement | None:
    """The part of a rank, or None."""
    return next((shard for shard in placement.shards if shard.rank == rank), None)
