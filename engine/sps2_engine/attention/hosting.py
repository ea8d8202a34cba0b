"""Who hosts what of a prompt: blocks of consecutive shards, their tokens, keys and sinks. Pure.

A rank hosts one block, or two (folded: one from either end, so that causal work is even).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

from sps2_engine.attention.pieces import LSE_BYTES, HeadRun, head_runs
from sps2_layout.layout import Layout, Sample, Span

CHUNK_BYTES = 1 << 20
"""Least bytes of a chunk: below about this an exchange takes as long as its latency (0.3 ms on Gloo)."""


@dataclass(frozen=True)
class Hosting(ABC):
    """A prompt's shards and a model's heads on P ranks.

    Raises:
        ValueError: ranks, shards, heads or groups do not divide each other as they must.
    """

    layout: Layout
    num_ranks: int
    """P; divides the number of shards."""
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    element_bytes: int
    """Bytes of an element of q, k, v and o."""
    chunk_bytes: int = CHUNK_BYTES
    """Least bytes that a rank sends for a chunk, in and out together."""
    first_kv_head: int = 0
    """What the first of these KV heads is numbered in the model: a tensor rank has some of them, and what a head
    samples goes by that number."""

    def __post_init__(self) -> None:
        if self.layout.num_shards % self.num_ranks:
            raise ValueError(f"{self.num_ranks} ranks do not divide {self.layout.num_shards} shards")
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_kv_heads} KV heads do not divide {self.num_q_heads} query heads")
        if self.head_dim * self.element_bytes % LSE_BYTES:
            raise ValueError(f"a head of {self.head_dim} elements leaves what is packed behind it misaligned")
        hosted = self.block_shards
        if any(level.group % hosted and hosted % level.group for level in self.layout.levels):
            raise ValueError(f"a block of {hosted} shards cuts through a group of {self.layout.levels}")

    @property
    @abstractmethod
    def blocks_per_rank(self) -> int:
        """1: consecutive shards; 2: folded."""

    @property
    def num_blocks(self) -> int:
        """Blocks of all ranks together."""
        return self.num_ranks * self.blocks_per_rank

    @property
    def block_shards(self) -> int:
        """Shards of a block."""
        return self.layout.num_shards // self.num_blocks

    @cached_property
    def of_first_tensor_rank(self) -> Self:
        """The same for the tensor rank with the model's first heads, itself where they sample alike.

        Its counts serve where all tensor ranks must come to the same number, though their heads sample other tokens.
        """
        samples_alike = self.first_kv_head % self.layout.levels[-1].stride == 0
        return self if samples_alike else replace(self, first_kv_head=0)

    @property
    def fold(self) -> int:
        """Query heads to a KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def all_heads(self) -> HeadRun:
        """Every head."""
        return HeadRun(Span(0, self.num_q_heads), Span(0, self.num_kv_heads))

    def halves(self) -> tuple[HeadRun, ...]:
        """All heads in two parts (or one head): by KV heads, or by query heads where one KV head is all."""
        kv_half = (self.num_kv_heads + 1) // 2 * self.fold
        middle = kv_half if self.num_kv_heads > 1 else (self.num_q_heads + 1) // 2
        parts = Span(0, middle), Span(middle, self.num_q_heads)
        return tuple(run for part in parts for run in head_runs(part, self.fold, single=False))

    def owner(self, block: int) -> int:
        """Rank that hosts a block."""
        return block if self.blocks_per_rank == 1 else min(block, self.num_blocks - 1 - block)

    def blocks(self, rank: int) -> tuple[int, ...]:
        """Blocks of a rank, in token order; none of a rank beyond the plan's, which stays idle."""
        if rank >= self.num_ranks:
            return ()
        return (rank,) if self.blocks_per_rank == 1 else (rank, self.num_blocks - 1 - rank)

    def block_tokens(self, block: int) -> Span:
        """Tokens of a block."""
        return self.layout.shards(block * self.block_shards, (block + 1) * self.block_shards)

    def spans(self, rank: int) -> tuple[Span, ...]:
        """Tokens of a rank, block by block: its rows, in this order."""
        return tuple(self.block_tokens(block) for block in self.blocks(rank))

    @cached_property
    def most_tokens(self) -> int:
        """Tokens of the rank that has most of them."""
        return max(sum(map(len, self.spans(rank))) for rank in range(self.num_ranks))

    @cached_property
    def last_rank(self) -> int:
        """Rank that has the last prompt token, and samples."""
        return self.owner(self.layout.shard_of(self.layout.num_tokens - 1) // self.block_shards)

    @cached_property
    def exchanges(self) -> bool:
        """Whether more than one rank has tokens, so that there may be something to exchange."""
        return sum(any(map(len, self.spans(rank))) for rank in range(self.num_ranks)) > 1

    def hosted(self, rank: int) -> Iterator[tuple[int, int]]:
        """(block, shard) of each shard of a rank, in token order."""
        for block in self.blocks(rank):
            for shard in range(block * self.block_shards, (block + 1) * self.block_shards):
                yield block, shard

    def dense_keys(self, rank: int, end: int) -> tuple[tuple[int, Sample], ...]:
        """All keys of a rank before a token."""
        spans = (span.cut(0, end) for span in self.spans(rank))
        return tuple((rank, Sample(span, 1, 0)) for span in spans if len(span))

    def level_keys(
        self, blocks: tuple[int, ...], shards: Span, level: int, run: HeadRun, layer: int
    ) -> tuple[tuple[int, Sample], ...]:
        """(rank, keys) that a level samples of the shards that lie in these blocks; none is empty."""
        keys = []
        for block in blocks:
            inside = shards.cut(block * self.block_shards, (block + 1) * self.block_shards)
            tokens = self.layout.shards(inside.begin, inside.end) if len(inside) else Span(0, 0)
            sample = self.layout.keys(tokens, level, self.first_kv_head + run.kv_heads.begin, layer)
            if len(sample):
                keys.append((self.owner(block), sample))
        return tuple(keys)

    def level_queries(self, span: Span, level: int, run: HeadRun, layer: int) -> Sample:
        """Queries of a span that read at a level."""
        return self.layout.queries(span, level, self.first_kv_head + run.kv_heads.begin, layer)

    def sinks_of(self, block: int, end: int) -> Sample:
        """Sinks of a block before a token."""
        sinks = self.layout.sink_span.cut(0, end)
        return Sample(self.block_tokens(block).cut(sinks.begin, sinks.end), 1, 0)
