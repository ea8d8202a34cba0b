"""The exchange schedule `kv`: sampled keys and values go to the ranks that see them. Pure.

It moves less than `heads` where groups are small or queries dense: about where G <= d * Hq / Hkv + 1. Each
rank computes what its own queries see, so causal work is uneven unless the shards are folded: of 2P blocks
rank r hosts blocks r and 2P-1-r, and every rank sees as many blocks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from sps2_engine.attention.pieces import HeadRun, Stage, Work, head_runs
from sps2_engine.attention.plan import AttentionPlan
from sps2_layout.layout import Span


@dataclass(frozen=True)
class KvPlan(AttentionPlan):
    """CSA of one prompt on P ranks by all-gather of the sampled keys and values."""

    folds_shards: bool = True
    """Whether a rank hosts blocks from both ends, where 2P divides the shards."""

    @property
    def blocks_per_rank(self) -> int:
        """See `AttentionPlan.blocks_per_rank`."""
        can_fold = self.num_ranks > 1 and self.layout.num_shards % (2 * self.num_ranks) == 0
        return 2 if self.folds_shards and can_fold else 1

    @property
    def returns_levels(self) -> bool:
        """Every rank computes for its own queries."""
        return False

    @property
    def max_chunks(self) -> int:
        """Chunks are of KV heads only."""
        return min(super().max_chunks, self.num_kv_heads)

    def level_bytes(self, level: int) -> float:
        """Keys and values that a rank lacks, half of them earlier (see `AttentionPlan.level_bytes`)."""
        group, lower = (self.layout.levels[n].group for n in (level, level - 1))
        if self.num_ranks == 1 or group <= self.block_shards:
            return 0.0
        sampled = self.layout.num_tokens * group / self.layout.num_shards / self.layout.levels[level].stride
        missing = (1 - 1 / self.num_ranks) * (1 - lower / group) / 2
        return sampled * missing * 2 * self.num_kv_heads * self.head_dim * self.element_bytes

    def rectangles(self, rank: int, layer: int, stage: Stage) -> Iterator[Work]:
        """Queries of each own block over what its level samples of other ranks, for a chunk of KV heads."""
        begin, end = ((stage.chunk + n) * self.num_kv_heads // stage.num_chunks * self.fold for n in (0, 1))
        single = self.layout.levels[stage.level].stride > 1
        for run in head_runs(Span(begin, end), self.fold, single=single):
            for block in self.blocks(rank):
                yield from self._rectangle(stage.level, run, rank, block, layer)

    def _rectangle(self, level: int, run: HeadRun, rank: int, block: int, layer: int) -> Iterator[Work]:
        """All shards of a block see the same earlier blocks at a level: groups and blocks nest."""
        group, lower = self.layout.levels[level].group, self.layout.levels[level - 1].group
        shard = block * self.block_shards
        seen = Span(shard // group * group, shard // lower * lower)
        others = tuple(other for other in range(block) if self.owner(other) != rank)
        queries = self.level_queries(self.block_tokens(block), level, run, layer)
        keys = self.level_keys(others, seen, level, run, layer)
        if len(queries) and keys:
            yield Work(level, run, rank, queries, keys)
