"""The plan of CSA over ranks by exchange of heads: who computes what, and which bytes go where. Pure.

Every rank makes the same plan from the same numbers, so nothing about shapes ever travels. A rank hosts N / P
consecutive shards. What a rank sees within its own shards it computes itself; what lies across ranks is computed by
heads inside the group of ranks of its level, each rank for its share of them ("rectangles"). Queries of the prompt's
tail go to every rank that holds keys, and partial outputs come back, as in decode. Sinks are copied to every rank.

    in:   source -> peer   [K | V | Q of the peer's heads, level by level] [tail Q] [sink K | V]
    out:  peer -> source   [O | LSE of those Q] [O | LSE of the tail]
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

from sps2_layout.layout import Layout, Sample, Span

LSE_BYTES = 4

PlaneKey: TypeAlias = tuple[str, int, int]


@dataclass(frozen=True)
class HeadRun:
    """Query heads that share a whole number of KV heads evenly: one attention call serves them."""

    q_heads: Span
    kv_heads: Span


@dataclass(frozen=True)
class Rectangle:
    """Queries of one rank over keys of earlier ranks at one level, for the heads of one run."""

    level: int
    run: HeadRun
    query_rank: int
    queries: Sample
    keys: tuple[tuple[int, Sample], ...]
    """(rank that holds them, which), in token order."""

    @property
    def num_keys(self) -> int:
        """Keys of all ranks together."""
        return sum(len(sample) for _, sample in self.keys)


@dataclass(frozen=True)
class LocalWork:
    """Queries of one rank over keys that it holds (or has been sent: sinks)."""

    run: HeadRun
    queries: Sample
    keys: Sample
    causal: bool = False
    """Whether key n is seen by query n and later ones only (a shard by itself)."""


@dataclass(frozen=True)
class Plane:
    """One dense array [rows, heads, head_dim] inside a packed buffer."""

    tensor: Literal["q", "k", "v"]
    level: int
    """Level that it serves; 0 for what every head has alike: the tail's Q, the sinks' K and V."""
    heads: Span
    rows: Sample

    @property
    def key(self) -> PlaneKey:
        """What tells it from the other planes of one rank in one layer."""
        return self.tensor, self.level, self.heads.begin


def split_heads(num_q_heads: int, num_ranks: int) -> tuple[Span, ...]:
    """Contiguous shares of the query heads, as even as they come (14 heads over 4 ranks: 3, 4, 3, 4)."""
    return tuple(
        Span(rank * num_q_heads // num_ranks, (rank + 1) * num_q_heads // num_ranks)
        for rank in range(num_ranks)
    )


def head_runs(q_heads: Span, fold: int, *, single: bool) -> tuple[HeadRun, ...]:
    """Cuts a share of query heads, `fold` to a KV head, into regular pieces.

    Args:
        single: One KV head to a piece (their samples differ); else KV heads that are wholly covered stay together.
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
class CsaPlan:
    """CSA of one prompt on P ranks."""

    layout: Layout
    num_ranks: int
    """P; divides the number of shards."""
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    element_bytes: int
    """Bytes of an element of q, k, v and o."""

    def __post_init__(self) -> None:
        if self.layout.num_shards % self.num_ranks:
            raise ValueError(f"{self.num_ranks} ranks do not divide {self.layout.num_shards} shards")
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_kv_heads} KV heads do not divide {self.num_q_heads} query heads")
        hosted = self.shards_per_rank
        if any(level.group % hosted and hosted % level.group for level in self.layout.levels):
            raise ValueError(f"the shards of a rank ({hosted}) cut through a group of {self.layout.levels}")

    # --- who has what ----------------------------------------------------------------------------------------

    @property
    def shards_per_rank(self) -> int:
        """N / P."""
        return self.layout.num_shards // self.num_ranks

    @property
    def fold(self) -> int:
        """Query heads to a KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def all_heads(self) -> HeadRun:
        """Every head."""
        return HeadRun(Span(0, self.num_q_heads), Span(0, self.num_kv_heads))

    def tokens(self, rank: int) -> Span:
        """Tokens of a rank."""
        return self.layout.rank_tokens(rank, self.num_ranks)

    @cached_property
    def last_rank(self) -> int:
        """Rank that has the last prompt token, and samples."""
        return max(rank for rank in range(self.num_ranks) if len(self.tokens(rank)))

    @property
    def exchanges(self) -> bool:
        """Whether any rank beyond the first has tokens, so that there is anything to exchange."""
        return self.last_rank > 0

    def group_size(self, level: int) -> int:
        """G_l: ranks of a level's group."""
        return max(1, self.layout.levels[level].group // self.shards_per_rank)

    def level_of(self, later: int, earlier: int) -> int | None:
        """The level at which a rank sees an earlier one; None where it does not."""
        for level in range(len(self.layout.levels)):
            size = self.group_size(level)
            if self.layout.levels[level].group >= self.shards_per_rank and later // size == earlier // size:
                return level
        return None

    # --- across ranks ----------------------------------------------------------------------------------------

    def phase(self, layer: int) -> int:
        """Layers of equal phase sample alike: their exchange is the same."""
        return layer % self.layout.levels[-1].stride

    def rectangles(self, rank: int, layer: int) -> Iterator[Rectangle]:
        """What `rank` computes for its group at each level: its share of the heads of every later query."""
        for level in range(1, len(self.layout.levels)):
            size = self.group_size(level)
            if size == self.group_size(level - 1):
                continue
            first = rank // size * size
            share = split_heads(self.num_q_heads, size)[rank - first]
            for run in head_runs(share, self.fold, single=self.layout.levels[level].stride > 1):
                for query_rank in range(first, first + size):
                    yield from self._rectangle(level, run, query_rank, first, layer)

    def _rectangle(
        self, level: int, run: HeadRun, query_rank: int, first: int, layer: int
    ) -> Iterator[Rectangle]:
        kv_head, lower = run.kv_heads.begin, self.group_size(level - 1)
        queries = self.layout.queries(self.tokens(query_rank), level, kv_head, layer)
        keys = [
            (key_rank, self.layout.keys(self.tokens(key_rank), level, kv_head, layer))
            for key_rank in range(first, query_rank // lower * lower)
        ]
        seen = tuple((key_rank, sample) for key_rank, sample in keys if len(sample))
        if len(queries) and seen:
            yield Rectangle(level, run, query_rank, queries, seen)

    def tail_queries(self, rank: int) -> Sample:
        """Queries of a rank that see every earlier key."""
        tail = self.layout.tail_span
        return Sample(self.tokens(rank).cut(tail.begin, tail.end), 1, 0)

    def tail_ranks(self, holder: int) -> tuple[int, ...]:
        """Ranks whose tail queries come to `holder`, which has earlier keys."""
        if not len(self.tokens(holder)):
            return ()
        return tuple(rank for rank in range(holder + 1, self.num_ranks) if len(self.tail_queries(rank)))

    def sink_keys(self, holder: int) -> Sample:
        """Sinks that a rank holds."""
        sinks = self.layout.sink_span
        return Sample(self.tokens(holder).cut(sinks.begin, sinks.end), 1, 0)

    def takes_sinks(self, rank: int, holder: int) -> bool:
        """Whether `rank` has queries that need the sinks of an earlier `holder`."""
        wanting = self.tokens(rank).cut(0, self.layout.tail_span.begin)
        return rank > holder and len(wanting) > 0 and len(self.sink_keys(holder)) > 0

    # --- what travels ----------------------------------------------------------------------------------------

    def in_planes(self, source: int, peer: int, layer: int) -> Iterator[Plane]:
        """What `source` sends to `peer` before compute, in order."""
        if source == peer:
            return
        sent: set[tuple[int, int]] = set()
        for rectangle in self.rectangles(peer, layer):
            for key_rank, sample in rectangle.keys:
                kept = (rectangle.level, rectangle.run.kv_heads.begin)
                if key_rank == source and kept not in sent:
                    sent.add(kept)
                    yield Plane("k", rectangle.level, rectangle.run.kv_heads, sample)
                    yield Plane("v", rectangle.level, rectangle.run.kv_heads, sample)
            if rectangle.query_rank == source:
                yield Plane("q", rectangle.level, rectangle.run.q_heads, rectangle.queries)
        if source in self.tail_ranks(peer):
            yield Plane("q", 0, self.all_heads.q_heads, self.tail_queries(source))
        if self.takes_sinks(peer, source):
            yield Plane("k", 0, self.all_heads.kv_heads, self.sink_keys(source))
            yield Plane("v", 0, self.all_heads.kv_heads, self.sink_keys(source))

    def out_planes(self, source: int, peer: int, layer: int) -> Iterator[Plane]:
        """The queries of `peer` for which `source` returns [O | LSE], in order."""
        if source == peer:
            return
        for plane in self.in_planes(peer, source, layer):
            if plane.tensor == "q":
                yield plane

    def in_bytes(self, source: int, peer: int, layer: int) -> int:
        """Bytes posted from `source` to `peer` on the way in."""
        row = self.head_dim * self.element_bytes
        return sum(len(plane.rows) * len(plane.heads) * row for plane in self.in_planes(source, peer, layer))

    def out_bytes(self, source: int, peer: int, layer: int) -> int:
        """Bytes posted from `source` (which computed) to `peer` (whose queries they are)."""
        row = self.head_dim * self.element_bytes + LSE_BYTES
        return sum(len(plane.rows) * len(plane.heads) * row for plane in self.out_planes(source, peer, layer))

    def bytes_per_layer(self, layer: int = 0) -> int:
        """Bytes that all ranks together post for one layer, in and out."""
        ranks = range(self.num_ranks)
        return sum(self.in_bytes(a, b, layer) + self.out_bytes(a, b, layer) for a in ranks for b in ranks)

    # --- within a rank ---------------------------------------------------------------------------------------

    def own_shards(self, rank: int) -> Iterator[LocalWork]:
        """Each hosted shard by itself, causally."""
        for shard in self._hosted(rank):
            tokens = Sample(self.layout.shard(shard), 1, 0)
            if len(tokens):
                yield LocalWork(self.all_heads, tokens, tokens, causal=True)

    def local_work(self, rank: int, layer: int) -> Iterator[LocalWork]:
        """All else that a rank computes from keys it holds or was sent as sinks."""
        for shard in self._hosted(rank):
            yield from self._local_tail(rank, shard)
            yield from self._local_sinks(shard)
            yield from self._local_levels(rank, shard, layer)

    def _hosted(self, rank: int) -> range:
        return range(rank * self.shards_per_rank, (rank + 1) * self.shards_per_rank)

    def _local_tail(self, rank: int, shard: int) -> Iterator[LocalWork]:
        """Tail queries of a shard over the earlier shards of the same rank."""
        tail, tokens = self.layout.tail_span, self.layout.shard(shard)
        queries = Sample(tokens.cut(tail.begin, tail.end), 1, 0)
        keys = Sample(Span(self.tokens(rank).begin, max(self.tokens(rank).begin, tokens.begin)), 1, 0)
        if len(queries) and len(keys):
            yield LocalWork(self.all_heads, queries, keys)

    def _local_sinks(self, shard: int) -> Iterator[LocalWork]:
        """Other queries of a shard over the sinks of earlier shards."""
        tokens = self.layout.shard(shard)
        queries = Sample(tokens.cut(0, self.layout.tail_span.begin), 1, 0)
        keys = Sample(self.layout.sink_span.cut(0, tokens.begin), 1, 0)
        if len(queries) and len(keys):
            yield LocalWork(self.all_heads, queries, keys)

    def _local_levels(self, rank: int, shard: int, layer: int) -> Iterator[LocalWork]:
        """Sampled queries of a shard over sampled keys of the earlier shards of the same rank, level by level."""
        first_hosted = self._hosted(rank).start
        for level in range(1, len(self.layout.levels)):
            lower, group = self.layout.levels[level - 1].group, self.layout.levels[level].group
            begin = max(first_hosted, shard // group * group)
            end = shard // lower * lower
            if begin >= end:
                continue
            single = self.layout.levels[level].stride > 1
            for run in head_runs(self.all_heads.q_heads, self.fold, single=single):
                kv_head = run.kv_heads.begin
                queries = self.layout.queries(self.layout.shard(shard), level, kv_head, layer)
                keys = self.layout.keys(self.layout.shards(begin, end), level, kv_head, layer)
                if len(queries) and len(keys):
                    yield LocalWork(run, queries, keys)

    # --- compute ---------------------------------------------------------------------------------------------

    def pairs(self, rank: int, layer: int) -> int:
        """Visible (query, key, query head) triples that `rank` computes; 4 * head_dim FLOPs each."""
        return self.own_pairs(rank) + self.rectangle_pairs(rank, layer) + self.local_pairs(rank, layer)

    def own_pairs(self, rank: int) -> int:
        """Those of a rank's own shards."""
        return sum(
            len(work.queries) * (len(work.queries) + 1) // 2 * len(work.run.q_heads)
            for work in self.own_shards(rank)
        )

    def rectangle_pairs(self, rank: int, layer: int) -> int:
        """Those that it computes for its groups, tails included."""
        tail_queries = sum(len(self.tail_queries(tail_rank)) for tail_rank in self.tail_ranks(rank))
        return tail_queries * len(self.tokens(rank)) * self.num_q_heads + sum(
            len(rectangle.queries) * rectangle.num_keys * len(rectangle.run.q_heads)
            for rectangle in self.rectangles(rank, layer)
        )

    def local_pairs(self, rank: int, layer: int) -> int:
        """Those of its local work."""
        return sum(
            len(work.queries) * len(work.keys) * len(work.run.q_heads)
            for work in self.local_work(rank, layer)
        )

    def flops_per_layer(self, layer: int = 0) -> int:
        """4 * D * visible pairs, all ranks and query heads."""
        return 4 * self.head_dim * sum(self.pairs(rank, layer) for rank in range(self.num_ranks))
