"""What the exchange schedules of CSA share: who hosts what, computes what locally, counts what. Pure.

Every rank makes the same plan from the same numbers, so nothing about shapes ever travels. A rank hosts one
block of consecutive shards, or two (folded: one from either end, so that causal work is even). What it sees
within its own blocks it computes itself. What lies across ranks is each schedule's own, level by level and
chunk by chunk (`Stage`). Queries of the prompt's tail go to every rank that holds keys, and partial outputs
come back, as in decode. Sinks are copied to every rank.

    in:   source -> peer   for each stage  [K | V | Q, as the schedule wants them], or [tail Q] [sink K | V]
    out:  peer -> source   for each stage  [O | LSE of those Q]
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from sps2_layout.layout import Layout, Sample, Span

LSE_BYTES = 4
CHUNK_BYTES = 1 << 20
"""Least bytes of a chunk: below about this an exchange takes as long as its latency (0.3 ms on Gloo)."""
MAX_CHUNKS = 4
"""More chunks hide no more: the first in and the last out are already an eighth of what travels."""


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


@dataclass(frozen=True)
class AttentionPlan(ABC):
    """CSA of one prompt on P ranks by one exchange schedule.

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

    # --- what a schedule decides ---------------------------------------------------------------------------

    @property
    @abstractmethod
    def blocks_per_rank(self) -> int:
        """1: consecutive shards; 2: folded."""

    @property
    @abstractmethod
    def returns_levels(self) -> bool:
        """Whether outputs travel back in the stages of levels."""

    @property
    def max_chunks(self) -> int:
        """Into how many chunks a level can be cut."""
        return MAX_CHUNKS

    @abstractmethod
    def level_bytes(self, level: int) -> float:
        """About what a rank exchanges at a level, in and out; 0 where it stays inside the rank."""

    @abstractmethod
    def rectangles(self, rank: int, layer: int, stage: Stage) -> Iterator[Work]:
        """What `rank` computes of a level's chunk across ranks."""

    # --- who has what --------------------------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        """Blocks of all ranks together."""
        return self.num_ranks * self.blocks_per_rank

    @property
    def block_shards(self) -> int:
        """Shards of a block."""
        return self.layout.num_shards // self.num_blocks

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
    def last_rank(self) -> int:
        """Rank that has the last prompt token, and samples."""
        return self.owner((self.layout.num_tokens - 1) // (self.block_shards * self.layout.shard_tokens))

    @cached_property
    def exchanges(self) -> bool:
        """Whether more than one rank has tokens, so that there may be something to exchange."""
        return sum(any(map(len, self.spans(rank))) for rank in range(self.num_ranks)) > 1

    # --- across ranks --------------------------------------------------------------------------------------

    def phase(self, layer: int) -> int:
        """Layers of equal phase sample alike: their exchange is the same."""
        return layer % self.layout.levels[-1].stride

    def stages(self) -> tuple[Stage, ...]:
        """The exchanges of a layer, in the order in which every rank posts them."""
        if not self.exchanges:
            return ()
        stages = [Stage(0)] if self.layout.tail or self.layout.sinks else []
        for level in range(1, len(self.layout.levels)):
            moved = self.level_bytes(level)
            if moved:
                num_chunks = max(1, min(self.max_chunks, int(moved // self.chunk_bytes)))
                stages += [Stage(level, chunk, num_chunks) for chunk in range(num_chunks)]
        return tuple(stages)

    def returns(self, stage: Stage) -> bool:
        """Whether a stage has an exchange out."""
        return self.returns_levels if stage.level else self.layout.tail > 0

    def works(self, rank: int, layer: int, stage: Stage) -> Iterator[Work]:
        """What `rank` computes in a stage, of queries or keys that other ranks hold."""
        return self.rectangles(rank, layer, stage) if stage.level else self._tail_works(rank)

    def _tail_works(self, holder: int) -> Iterator[Work]:
        """Tail queries of other ranks over the earlier keys of `holder`."""
        tail = self.layout.tail_span
        for block in range(self.num_blocks):
            queries = Sample(self.block_tokens(block).cut(tail.begin, tail.end), 1, 0)
            keys = self._dense_keys(holder, self.block_tokens(block).begin)
            if self.owner(block) != holder and len(queries) and keys:
                yield Work(0, self.all_heads, self.owner(block), queries, keys)

    def _dense_keys(self, rank: int, end: int) -> tuple[tuple[int, Sample], ...]:
        """All keys of a rank before a token."""
        spans = (span.cut(0, end) for span in self.spans(rank))
        return tuple((rank, Sample(span, 1, 0)) for span in spans if len(span))

    def _sinks(self, block: int, end: int) -> Sample:
        """Sinks of a block before a token."""
        sinks = self.layout.sink_span.cut(0, end)
        return Sample(self.block_tokens(block).cut(sinks.begin, sinks.end), 1, 0)

    def _sinks_sent(self, source: int, peer: int) -> Iterator[Sample]:
        """Sinks of `source`, block by block, that queries of `peer` outside the tail need."""
        body = self.layout.tail_span.begin
        for block in self.blocks(source):
            sinks = self._sinks(block, self.layout.num_tokens)
            later = (self.block_tokens(other) for other in self.blocks(peer) if other > block)
            if len(sinks) and any(len(span.cut(0, body)) for span in later):
                yield sinks

    # --- what travels --------------------------------------------------------------------------------------

    def in_planes(self, source: int, peer: int, layer: int, stage: Stage) -> Iterator[Plane]:
        """What `source` sends to `peer` before compute, in order."""
        if source == peer:
            return
        sent: set[Plane] = set()
        for work in self.works(peer, layer, stage):
            for holder, sample in work.keys if work.brings_keys else ():
                keys = Plane("k", work.level, work.run.kv_heads, sample)
                if holder == source and keys not in sent:
                    sent.add(keys)
                    yield keys
                    yield Plane("v", work.level, work.run.kv_heads, sample)
            if work.query_rank == source:
                yield work.query_plane
        for sinks in self._sinks_sent(source, peer) if not stage.level else ():
            yield Plane("k", 0, self.all_heads.kv_heads, sinks)
            yield Plane("v", 0, self.all_heads.kv_heads, sinks)

    def out_planes(self, source: int, peer: int, layer: int, stage: Stage) -> Iterator[Plane]:
        """The queries of `peer` for which `source` returns [O | LSE], in order."""
        if source != peer:
            for work in self.works(source, layer, stage):
                if work.query_rank == peer:
                    yield work.query_plane

    def in_bytes(self, source: int, peer: int, layer: int, stage: Stage) -> int:
        """Bytes posted from `source` to `peer` on the way in."""
        planes = self.in_planes(source, peer, layer, stage)
        return sum(plane.num_vectors for plane in planes) * self.head_dim * self.element_bytes

    def out_bytes(self, source: int, peer: int, layer: int, stage: Stage) -> int:
        """Bytes posted from `source` (which computed) to `peer` (whose queries they are)."""
        planes = self.out_planes(source, peer, layer, stage)
        return sum(plane.num_vectors for plane in planes) * (self.head_dim * self.element_bytes + LSE_BYTES)

    def pair_bytes(self, source: int, peer: int, layer: int = 0) -> int:
        """Bytes that a rank posts to another for one layer, in and out."""
        return sum(
            self.in_bytes(source, peer, layer, stage) + self.out_bytes(source, peer, layer, stage)
            for stage in self.stages()
        )

    def sent_bytes(self, rank: int, layer: int = 0) -> int:
        """Bytes that a rank posts for one layer, in and out."""
        return sum(self.pair_bytes(rank, peer, layer) for peer in range(self.num_ranks))

    def bytes_per_layer(self, layer: int = 0) -> int:
        """Bytes that all ranks together post for one layer, in and out."""
        return sum(self.sent_bytes(rank, layer) for rank in range(self.num_ranks))

    # --- within a rank -------------------------------------------------------------------------------------

    def own_shards(self, rank: int, run: HeadRun) -> Iterator[Work]:
        """Each hosted shard by itself, causally, for some heads."""
        for _, shard in self._hosted(rank):
            tokens = Sample(self.layout.shard(shard), 1, 0)
            if len(tokens):
                yield Work(0, run, rank, tokens, ((rank, tokens),), causal=True)

    def local_work(self, rank: int, layer: int) -> Iterator[Work]:
        """All else that a rank computes from keys it holds or was sent as sinks."""
        for block, shard in self._hosted(rank):
            yield from self._local_tail(rank, shard)
            yield from self._local_sinks(rank, block, shard)
            yield from self._local_levels(rank, shard, layer)

    def _hosted(self, rank: int) -> Iterator[tuple[int, int]]:
        """(block, shard) of each shard of a rank, in token order."""
        for block in self.blocks(rank):
            for shard in range(block * self.block_shards, (block + 1) * self.block_shards):
                yield block, shard

    def _local_tail(self, rank: int, shard: int) -> Iterator[Work]:
        """Tail queries of a shard over the earlier shards of the same rank."""
        tail, tokens = self.layout.tail_span, self.layout.shard(shard)
        queries = Sample(tokens.cut(tail.begin, tail.end), 1, 0)
        keys = self._dense_keys(rank, tokens.begin)
        if len(queries) and keys:
            yield Work(0, self.all_heads, rank, queries, keys)

    def _local_sinks(self, rank: int, block: int, shard: int) -> Iterator[Work]:
        """Other queries of a shard over the sinks of earlier shards, which every rank was sent."""
        tokens = self.layout.shard(shard)
        queries = Sample(tokens.cut(0, self.layout.tail_span.begin), 1, 0)
        sinks = ((self.owner(holder), self._sinks(holder, tokens.begin)) for holder in range(block + 1))
        keys = tuple((holder, sample) for holder, sample in sinks if len(sample))
        if len(queries) and keys:
            yield Work(0, self.all_heads, rank, queries, keys)

    def _local_levels(self, rank: int, shard: int, layer: int) -> Iterator[Work]:
        """Sampled queries of a shard over sampled keys of earlier own shards, level by level."""
        for level in range(1, len(self.layout.levels)):
            lower, group = self.layout.levels[level - 1].group, self.layout.levels[level].group
            seen = Span(shard // group * group, shard // lower * lower)
            if not len(seen):
                continue
            for run in head_runs(
                self.all_heads.q_heads, self.fold, single=self.layout.levels[level].stride > 1
            ):
                queries = self.layout.queries(self.layout.shard(shard), level, run.kv_heads.begin, layer)
                keys = self.level_keys(self.blocks(rank), seen, level, run, layer)
                if len(queries) and keys:
                    yield Work(level, run, rank, queries, keys)

    def level_keys(
        self, blocks: tuple[int, ...], shards: Span, level: int, run: HeadRun, layer: int
    ) -> tuple[tuple[int, Sample], ...]:
        """(rank, keys) that a level samples of the shards that lie in these blocks; none is empty."""
        keys = []
        for block in blocks:
            inside = shards.cut(block * self.block_shards, (block + 1) * self.block_shards)
            tokens = self.layout.shards(inside.begin, inside.end) if len(inside) else Span(0, 0)
            sample = self.layout.keys(tokens, level, run.kv_heads.begin, layer)
            if len(sample):
                keys.append((self.owner(block), sample))
        return tuple(keys)

    # --- compute -------------------------------------------------------------------------------------------

    def pairs(self, rank: int, layer: int) -> int:
        """Visible (query, key, query head) triples that `rank` computes; 4 * head_dim FLOPs each."""
        local = [*self.own_shards(rank, self.all_heads), *self.local_work(rank, layer)]
        across = (work for stage in self.stages() for work in self.works(rank, layer, stage))
        return sum(work.pairs for work in local) + sum(work.pairs for work in across)

    def flops_per_layer(self, layer: int = 0) -> int:
        """4 * D * visible pairs, all ranks and query heads."""
        return 4 * self.head_dim * sum(self.pairs(rank, layer) for rank in range(self.num_ranks))
