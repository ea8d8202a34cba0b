"""What one decode rank holds of each row: blocks of its KV, and at home its tokens.

Knows nothing of models, collectives or transfers.
"""

from dataclasses import dataclass, field

from sps2.internal.v1 import engine_pb2, placement_pb2
from sps2_engine.attention.decode_plan import DecodeRow
from sps2_engine.choice import sampling_params
from sps2_engine.kv_pool import slot_runs
from sps2_engine.sampler import SamplingParams


@dataclass
class RowState:
    """One row on one rank. Its local KV is the rank's run of the prompt, then (at home) the new tokens."""

    reserve: engine_pb2.ReserveRow
    rank: int
    """This rank."""
    blocks: list[int]
    """Blocks of its local KV, in order; empty where the rank holds none."""
    num_local: int
    """Tokens of local KV."""
    admitted: bool = False
    finished: bool = False
    """Its last token was sampled here; what later steps compute for it is dropped."""
    token_id: int = -1
    """At home: the token that the next step takes in."""
    num_outputs: int = 0
    """At home: tokens sampled so far, the first (prefill's) included."""
    q_exchange_bytes: int = 0
    """At home: bytes of Q exchange so far."""
    sampling: SamplingParams = field(init=False)
    plan_row: DecodeRow = field(init=False)
    """The row as the step's plan has it."""

    def __post_init__(self) -> None:
        self.sampling = sampling_params(self.reserve.choice)
        holders = tuple(sorted(shard.rank for shard in self.reserve.placement.shards))
        self.plan_row = DecodeRow(self.reserve.row, self.reserve.home, holders)

    @property
    def is_home(self) -> bool:
        """Whether this rank runs its dense layers."""
        return self.reserve.home == self.rank

    @property
    def position(self) -> int:
        """Position in the text of the token that the next step takes in."""
        return self.reserve.num_prompt_tokens + self.num_outputs - 1

    def admit(self, first_token_id: int) -> None:
        """The row starts to decode with the token that prefill sampled."""
        self.admitted, self.token_id, self.num_outputs = True, first_token_id, 1

    def append_slot(self) -> int:
        """Takes the next slot for a new token's KV; a finished row writes its last slot again."""
        if not self.finished:
            self.num_local += 1
        ((begin, _end),) = slot_runs(self.blocks, 1, self.num_local - 1)
        return begin

    def runs(self) -> list[tuple[int, int]]:
        """Cache slots of its local KV."""
        return slot_runs(self.blocks, self.num_local)


def shard_of(placement: placement_pb2.Placement, rank: int) -> placement_pb2.ShardPlacement | None:
    """The part of a rank, or None."""
    return next((shard for shard in placement.shards if shard.rank == rank), None)
