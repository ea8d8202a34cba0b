"""The KV of a measured batch on one rank: blocks, filled with the context, and the slots that new tokens take."""

from sps2_bench.decode.cases import rows_of
from sps2_bench.decode.context import Context
from sps2_engine.attention.q_exchange import LayerCache
from sps2_engine.kv_pool import BLOCK_TOKENS, BlockPool, KvArena, slot_runs
from sps2_engine.mesh import WHOLE_MODEL, TensorShare
from sps2_engine.models import ModelConfig


class Batch:
    """Rows of equal contexts, each on as many ranks as its blocks allow."""

    def __init__(
        self,
        config: ModelConfig,
        context: int,
        batch: int,
        num_steps: int,
        rank: int,
        num_ranks: int,
        share: TensorShare = WHOLE_MODEL,
    ) -> None:
        """Takes blocks for the context and for `num_steps` new tokens of the rows at home, and fills them.

        `rank` is the sequence index where ranks split layers; `share` says which KV heads are held.
        """
        self.rows, ranges = rows_of(context, batch, num_ranks)
        self._held = range(*ranges[rank]) if rank < len(ranges) else range(0)
        held = [row.row_id for row in self.rows if rank in row.holders]
        needed = {
            row: -(-(len(self._held) + num_steps * (self.rows[row].home == rank)) // BLOCK_TOKENS)
            for row in held
        }
        pool = BlockPool(sum(needed.values()))
        self._blocks = {row: pool.allocate(count) for row, count in needed.items()}
        self._heads = share.kv_heads(config.num_kv_heads).span.slice
        num_heads = self._heads.stop - self._heads.start
        arena = KvArena(config.num_layers, pool.num_blocks, num_heads, config.head_dim)
        self.caches = [LayerCache(k, v) for k, v in zip(arena.k, arena.v, strict=True)]
        self._fill(Context(config, context, batch))

    def _fill(self, context: Context) -> None:
        for row, runs in self.runs().items():
            for layer, cache in enumerate(self.caches):
                k, v = context.kv(row, layer)[:, self._held.start : self._held.stop, self._heads]
                done = 0
                for begin, end in runs:
                    cache.k[begin:end] = k[done : done + end - begin]
                    cache.v[begin:end] = v[done : done + end - begin]
                    done += end - begin

    def runs(self) -> dict[int, list[tuple[int, int]]]:
        """Slots of each held row's context."""
        return {row: slot_runs(blocks, len(self._held)) for row, blocks in self._blocks.items()}

    def new_slot(self, row: int, step: int) -> int:
        """Where a home row's token of a step goes."""
        ((slot, _end),) = slot_runs(self._blocks[row], 1, len(self._held) + step)
        return slot
