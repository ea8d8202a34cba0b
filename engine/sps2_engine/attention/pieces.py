"""The nouns of a plan of CSA: runs of heads, planes that travel, stages, calls of attention. Pure."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from sps2_layout.layout import Sample, Span

LSE_BYTES = 4
"""Bytes of a log-sum-exp, which travels beside every output vector."""


@dataclass(frozen=True)
class HeadRun:
    """Query heads that share a whole number of KV heads evenly: one attention call serves them."""

    q_heads: Span
    kv_heads: Span


@dataclass(frozen=True)
class Plane:
    """One dense array [rows, heads, head_dim] inside a packed buffer."""

    tensor: Literal["q", "k", "v"]
    level: int
    """Level that it serves; 0 for what every head has alike: the tail's Q, the sinks' K and V."""
    heads: Span
    rows: Sample

    @property
    def num_vectors(self) -> int:
        """Rows of all heads together."""
        return len(self.rows) * len(self.heads)


@dataclass(frozen=True)
class Stage:
    """What one exchange in (and one out) carries: a chunk of a level; level 0 is the tail and the sinks."""

    level: int
    chunk: int = 0
    num_chunks: int = 1

    def __str__(self) -> str:
        return f"{self.level}.{self.chunk}"


@dataclass(frozen=True)
class Work:
    """Queries of one rank over keys, for the heads of one run: one call of attention."""

    level: int
    run: HeadRun
    query_rank: int
    queries: Sample
    keys: tuple[tuple[int, Sample], ...]
    """(rank that holds them, which), in token order."""
    causal: bool = False
    """Whether key n is seen by query n and later ones only (a shard by itself)."""
    brings_keys: bool = True
    """Whether the keys travel in this work's stage; else an earlier block of its queries brought them."""

    @property
    def num_keys(self) -> int:
        """Keys of all ranks together."""
        return sum(len(sample) for _, sample in self.keys)

    @property
    def pairs(self) -> int:
        """Visible (query, key, query head) triples; 4 * head_dim FLOPs each."""
        rows = len(self.queries)
        return (rows * (rows + 1) // 2 if self.causal else rows * self.num_keys) * len(self.run.q_heads)

    @cached_property
    def query_plane(self) -> Plane:
        """Its queries as they travel."""
        return Plane("q", self.level, self.run.q_heads, self.queries)


def head_runs(q_heads: Span, fold: int, *, single: bool) -> tuple[HeadRun, ...]:
    """Cuts a share of query heads, `fold` to a KV head, into regular pieces.

    Args:
        q_heads: the share.
        fold: query heads to a KV head.
        single: one KV head to a piece (their samples differ); else those wholly covered stay together.
    """
    if not len(q_heads):
        return ()
    pieces: list[HeadRun] = []
    for kv_head in range(q_heads.begin // fold, (q_heads.end - 1) // fold + 1):
        covered = q_heads.cut(kv_head * fold, (kv_head + 1) * fold)
        last = pieces[-1] if pieces and not single else None
        if last and len(covered) == fold and len(last.q_heads) == fold * len(last.kv_heads):
            pieces[-1] = HeadRun(
                Span(last.q_heads.begin, covered.end), Span(last.kv_heads.begin, kv_head + 1)
            )
        else:
            pieces.append(HeadRun(covered, Span(kv_head, kv_head + 1)))
    return tuple(pieces)
