"""The exchange schedule `heads` (the paper's): what lies across ranks is computed by heads. Pure.

A rank hosts N / P consecutive shards. In the group of ranks of a level each rank computes its share of the
heads for all of the group's queries over earlier ranks: K, V and Q of those heads come in, outputs go back.
Compute is even, and bytes fall with the stride of queries and keys alike.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from sps2_engine.attention.pieces import LSE_BYTES, HeadRun, Stage, Work, head_runs
from sps2_engine.attention.plan import AttentionPlan
from sps2_layout.layout import Sample, Span


def split_heads(num_q_heads: int, num_ranks: int) -> tuple[Span, ...]:
    """Contiguous shares of the query heads, as even as they come (14 heads over 4 ranks: 3, 4, 3, 4)."""
    return tuple(
        Span(rank * num_q_heads // num_ranks, (rank + 1) * num_q_heads // num_ranks)
        for rank in range(num_ranks)
    )


@dataclass(frozen=True)
class Piece:
    """What of a rank's share of the heads goes into one chunk."""

    q_heads: Span
    row_block: int = 0
    num_row_blocks: int = 1


def chunk_pieces(share: Span, fold: int, stage: Stage) -> Iterator[Piece]:
    """A share of the query heads cut into chunks by KV heads; where these are too few, by query rows.

    The row blocks of a KV head come in order: the chunk of the first brings the keys.
    """
    if not len(share):
        return
    first, last = share.begin // fold, (share.end - 1) // fold + 1
    num_row_blocks = -(-stage.num_chunks // (last - first))
    num_pieces = (last - first) * num_row_blocks
    # Piece p goes into chunk p * chunks // pieces: this chunk's are [begin, end).
    begin, end = (-(-(stage.chunk + n) * num_pieces // stage.num_chunks) for n in (0, 1))
    if num_row_blocks == 1:
        heads = share.cut((first + begin) * fold, (first + end) * fold)
        yield from [Piece(heads)] if len(heads) else []
        return
    for piece in range(begin, end):
        kv_head, row_block = first + piece // num_row_blocks, piece % num_row_blocks
        yield Piece(share.cut(kv_head * fold, (kv_head + 1) * fold), row_block, num_row_blocks)


def row_block(sample: Sample, index: int, num_blocks: int) -> Sample:
    """One of the even blocks that the rows of a sample are cut into; the first is the fullest."""
    begin, end = (min(len(sample), -(-n * len(sample) // num_blocks)) for n in (index, index + 1))
    first = sample.first + begin * sample.stride
    last = sample.span.end if end == len(sample) else sample.first + end * sample.stride
    return Sample(Span(min(first, last), last), sample.stride, sample.offset)


@dataclass(frozen=True)
class CsaPlan(AttentionPlan):
    """CSA of one prompt on P ranks by exchange of heads."""

    @property
    def blocks_per_rank(self) -> int:
        """Consecutive shards: the groups of ranks are those of the layout."""
        return 1

    @property
    def returns_levels(self) -> bool:
        """Outputs go back to where the queries came from."""
        return True

    def tokens(self, rank: int) -> Span:
        """Tokens of a rank."""
        return self.block_tokens(rank)

    def group_size(self, level: int) -> int:
        """G_l: ranks of a level's group."""
        return max(1, self.layout.levels[level].group // self.block_shards)

    def level_bytes(self, level: int) -> float:
        """The closed form of `attention.md` (see `AttentionPlan.level_bytes`)."""
        size, lower = self.group_size(level), self.group_size(level - 1)
        stride, vector = self.layout.levels[level].stride, self.head_dim * self.element_bytes
        q_share = 1.0 if self.layout.dense_queries else 1 / stride
        per_token = q_share * self.num_q_heads * (2 * vector + LSE_BYTES)
        per_token += 2 * vector * max(self.num_kv_heads, size) / stride
        return (1 - 1 / size) * (1 - lower / size) * self.layout.num_tokens / self.num_ranks * per_token

    def rectangles(self, rank: int, layer: int, stage: Stage) -> Iterator[Work]:
        """Queries of every rank of the group over those before it, for a chunk of this rank's heads."""
        size = self.group_size(stage.level)
        first = rank // size * size
        share = split_heads(self.num_q_heads, size)[rank - first]
        single = self.layout.levels[stage.level].stride > 1
        for piece in chunk_pieces(share, self.fold, stage):
            for run in head_runs(piece.q_heads, self.fold, single=single):
                for query_rank in range(first, first + size):
                    yield from self._rectangle(stage.level, piece, run, query_rank, layer)

    def _rectangle(
        self, level: int, piece: Piece, run: HeadRun, query_rank: int, layer: int
    ) -> Iterator[Work]:
        size, lower = self.group_size(level), self.group_size(level - 1)
        sampled = self.level_queries(self.tokens(query_rank), level, run, layer)
        queries = row_block(sampled, piece.row_block, piece.num_row_blocks)
        seen = Span(query_rank // size * size, query_rank // lower * lower)
        shards = Span(seen.begin * self.block_shards, seen.end * self.block_shards)
        keys = self.level_keys(tuple(range(seen.begin, seen.end)), shards, level, run, layer)
        if len(queries) and keys:
            yield Work(level, run, query_rank, queries, keys, brings_keys=piece.row_block == 0)
