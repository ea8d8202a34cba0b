"""The plan of one decode step: whose Q goes where, and what comes back.

Pure: no torch, no ranks at work, no clock. Every rank makes the same plan from the same rows, so nothing about
shapes ever travels. Rows are always in the order of their ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class DecodeRow:
    """One request in the batch."""

    row_id: int
    """Number of the row, unique within the epoch."""
    home: int
    """Rank that runs the dense layers for it; always a holder."""
    holders: tuple[int, ...]
    """Ranks that hold blocks of its KV, ascending."""

    def __post_init__(self) -> None:
        if self.home not in self.holders:
            raise ValueError(
                f"row {self.row_id}: its home {self.home} must be one of its holders {self.holders}"
            )


@dataclass(frozen=True)
class DecodePlan:
    """Exchange of one step over `rows`, the same for each layer."""

    rows: tuple[DecodeRow, ...]
    num_ranks: int
    num_q_heads: int
    head_dim: int
    element_bytes: int
    """Bytes of an element of q and o."""

    def __post_init__(self) -> None:
        ids = [row.row_id for row in self.rows]
        if ids != sorted(set(ids)):
            raise ValueError(f"rows must be in ascending order of their ids, not {ids}")

    @property
    def q_row_bytes(self) -> int:
        """Bytes of one row's Q."""
        return self.num_q_heads * self.head_dim * self.element_bytes

    @property
    def out_row_bytes(self) -> int:
        """Bytes of one row's [O | LSE fp32]."""
        return self.q_row_bytes + self.num_q_heads * 4

    @cached_property
    def exchanges(self) -> bool:
        """Whether any row has KV away from home; without one a step posts nothing."""
        return any(len(row.holders) > 1 for row in self.rows)

    def at_home(self, rank: int) -> tuple[DecodeRow, ...]:
        """Rows whose dense layers `rank` runs."""
        return tuple(row for row in self.rows if row.home == rank)

    def guests(self, home: int, holder: int) -> tuple[DecodeRow, ...]:
        """Rows of `home` that send their Q to `holder`."""
        if home == holder:
            return ()
        return tuple(row for row in self.rows if row.home == home and holder in row.holders)

    def q_bytes(self, home: int, holder: int) -> int:
        """Bytes of Q from `home` to `holder` in one layer."""
        return len(self.guests(home, holder)) * self.q_row_bytes

    def out_bytes(self, holder: int, home: int) -> int:
        """Bytes of [O | LSE] that return in one layer."""
        return len(self.guests(home, holder)) * self.out_row_bytes

    def row_bytes_per_layer(self, row: DecodeRow) -> int:
        """(h-1) * Hq * (2bd + 4), whatever the context length (`decode.md`)."""
        return (len(row.holders) - 1) * (self.q_row_bytes + self.out_row_bytes)

    def bytes_per_layer(self) -> int:
        """Bytes that all ranks together post for one layer."""
        ranks = range(self.num_ranks)
        return sum(self.q_bytes(a, b) + self.out_bytes(a, b) for a in ranks for b in ranks)


def place_tokens(
    num_tokens: int, block_tokens: int, max_holders: int, min_tokens: int
) -> tuple[tuple[int, int], ...]:
    """Splits a prompt into contiguous ranges of whole blocks, one for each holder, as even as blocks allow.

    Args:
        num_tokens: tokens of the prompt, >= 1.
        block_tokens: tokens of a block.
        max_holders: ranks of the group.
        min_tokens: a further holder is taken only while each would hold at least this many.

    Returns:
        Ranges [begin, end) that cover [0, num_tokens) without gaps; every one but the last ends on a block.
    """
    num_blocks = -(-num_tokens // block_tokens)
    num_holders = max(1, min(max_holders, num_blocks, num_tokens // max(1, min_tokens)))
    edges = [holder * num_blocks // num_holders * block_tokens for holder in range(num_holders)]
    return tuple(zip(edges, [*edges[1:], num_tokens], strict=True))


def choose_holders(free_blocks: Sequence[int], num_shards: int) -> tuple[int, ...]:
    """The ranks with most free blocks, one for each shard, in ascending order of rank."""
    by_room = sorted(range(len(free_blocks)), key=lambda rank: (-free_blocks[rank], rank))
    return tuple(sorted(by_room[:num_shards]))
