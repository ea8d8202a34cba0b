"""What a rank computes by itself: its own shards, and all it sees of keys that it holds or was sent. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass

from sps2_engine.attention.hosting import Hosting
from sps2_engine.attention.pieces import HeadRun, Work, head_runs
from sps2_layout.layout import Sample, Span


@dataclass(frozen=True)
class LocalPlan(Hosting):
    """The part of a plan that needs no exchange, or only the sinks of one."""

    def own_shards(self, rank: int, run: HeadRun) -> Iterator[Work]:
        """Each hosted shard by itself, causally, for some heads."""
        for _, shard in self.hosted(rank):
            tokens = Sample(self.layout.shard(shard), 1, 0)
            if len(tokens):
                yield Work(0, run, rank, tokens, ((rank, tokens),), causal=True)

    def local_work(self, rank: int, layer: int) -> Iterator[Work]:
        """All else that a rank computes from keys it holds or was sent as sinks."""
        for block, shard in self.hosted(rank):
            yield from self._local_tail(rank, shard)
            yield from self._local_sinks(rank, block, shard)
            yield from self._local_levels(rank, shard, layer)

    def _local_tail(self, rank: int, shard: int) -> Iterator[Work]:
        """Tail queries of a shard over the earlier shards of the same rank."""
        tail, tokens = self.layout.tail_span, self.layout.shard(shard)
        queries = Sample(tokens.cut(tail.begin, tail.end), 1, 0)
        keys = self.dense_keys(rank, tokens.begin)
        if len(queries) and keys:
            yield Work(0, self.all_heads, rank, queries, keys)

    def _local_sinks(self, rank: int, block: int, shard: int) -> Iterator[Work]:
        """Other queries of a shard over the sinks of earlier shards, which every rank was sent."""
        tokens = self.layout.shard(shard)
        queries = Sample(tokens.cut(0, self.layout.tail_span.begin), 1, 0)
        sinks = ((self.owner(holder), self.sinks_of(holder, tokens.begin)) for holder in range(block + 1))
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
                queries = self.level_queries(self.layout.shard(shard), level, run, layer)
                keys = self.level_keys(self.blocks(rank), seen, level, run, layer)
                if len(queries) and keys:
                    yield Work(level, run, rank, queries, keys)
