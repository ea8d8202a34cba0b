"""What one decode rank holds of each row: blocks of its KV, and at home its tokens.

Knows nothing of models, collectives or transfers.
"""

from dataclasses import dataclass, field

import torch

from sps2.internal.v1 import engine_pb2, placement_pb2
from sps2_engine.attention.decode_plan import DecodeRow
from sps2_engine.choice import ChoiceState
from sps2_engine.kv_pool import BLOCK_TOKENS, slot_runs
from sps2_layout.placement import parts


@dataclass
class RowState:
    """One choice's row on one rank. Its local KV: what the rank has of the prompt, then (at home) the new tokens."""

    row_id: int
    reserve: engine_pb2.ReserveRow
    """The attempt's, for all of its choices."""
    rank: int
    """This rank."""
    choice_index: int
    """The choice's, within the attempt."""
    blocks: list[int]
    """Blocks of its local KV, in order; empty where the rank holds none."""
    num_local: int
    """Tokens of local KV."""
    source: "RowState | None" = None
    """The row whose prompt it shares; None for choice 0."""
    num_shared: int = 0
    """Blocks at the front of `blocks` that are also the source's."""
    num_prompt_blocks: int = field(init=False)
    """Blocks at the front of `blocks` that the prompt fills: once it is there, nobody writes to them."""
    admitted: bool = False
    finished: bool = False
    """Its last token was sampled here; what later steps compute for it is dropped."""
    token_id: int = -1
    """At home: the token that the next step takes in."""
    choice: ChoiceState | None = None
    """At home, once admitted: its tokens so far."""
    q_exchange_bytes: int = 0
    """At home: bytes of Q exchange so far."""
    plan_row: DecodeRow = field(init=False)
    """The row as the step's plan has it."""

    def __post_init__(self) -> None:
        self.num_prompt_blocks = self.num_local // BLOCK_TOKENS
        holders = {part.rank for part in parts(self.reserve.placement)}
        self.plan_row = DecodeRow(self.row_id, self.reserve.home, tuple(sorted(holders)))

    @property
    def is_home(self) -> bool:
        """Whether this rank runs its dense layers."""
        return self.reserve.home == self.rank

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
        self.admitted, self.token_id = True, first_token_id
        if self.is_home:
            reserve = self.reserve
            self.choice = ChoiceState(reserve.choice, self.choice_index, reserve.num_prompt_tokens, device)
            self.choice.take(first_token_id)

    def copied_slots(self) -> tuple[list[int], list[int]]:
        """Slots of prompt tokens that lie in a block of its own: those of the row it shares with, and its own."""
        if self.source is None:
            return [], []
        begin = min(self.num_shared * BLOCK_TOKENS, self.num_local)
        return (
            _slots(self.source.blocks, begin, self.num_local),
            _slots(self.blocks, begin, self.num_local),
        )

    def append_slot(self) -> int:
        """Takes the next slot for a new token's KV; a finished row's is never read."""
        self.num_local += 1
        ((begin, _end),) = slot_runs(self.blocks, 1, self.num_local - 1)
        return begin

    def runs(self) -> list[tuple[int, int]]:
        """Cache slots of its local KV."""
        return slot_runs(self.blocks, self.num_local)


def _slots(blocks: list[int], begin: int, end: int) -> list[int]:
    return [slot for run in slot_runs(blocks, end - begin, begin) for slot in range(*run)]


def num_held_blocks(placement: placement_pb2.Placement, rank: int) -> int:
    """Blocks that a rank has of what is held already."""
    tokens = sum(part.token_end - part.token_begin for part in placement.held if part.rank == rank)
    return tokens // BLOCK_TOKENS


def shard_of(placement: placement_pb2.Placement, rank: int) -> placement_pb2.ShardPlacement | None:
    """The part of a rank, or None."""
    return next((shard for shard in placement.shards if shard.rank == rank), None)
