"""Cached KV of one prefill rank: blocks of delivered prompts, by the runs that the leader counts in.

Obeys: what is kept, used and evicted the leader says, in commands that every rank executes in the same order. Not
thread-safe: `Publisher` calls it under its lock.
"""

from collections.abc import Iterable

from sps2.internal.v1 import engine_pb2
from sps2_engine.kv_pool import BLOCK_TOKENS, BlockPool
from sps2_engine.kv_transfer.rows import Rows, UsedRows, cut_rows, num_before
from sps2_layout.layout import Span


class KeptRuns:
    """Owns the blocks of runs that are kept, one owner of each; who reads them is another."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._runs: dict[int, Rows] = {}

    def keep(self, number: int, rows: Rows, token_end: int) -> None:
        """Takes over the blocks of a run, and frees those behind its last kept token."""
        kept = Span(0, num_before(rows.spans, token_end))
        num_blocks = -(-kept.end // BLOCK_TOKENS)
        self._pool.free(rows.blocks[num_blocks:])
        self._runs[number] = Rows(cut_rows(rows.spans, kept), rows.blocks[:num_blocks])

    def find(self, parts: Iterable[engine_pb2.CachedPart]) -> list[UsedRows]:
        """What this rank has of the beginning of a text.

        Raises:
            ValueError: a run is not held: the leader counts otherwise.
        """
        found = []
        for part in parts:
            if part.run not in self._runs:
                raise ValueError(f"run {part.run} is not cached here")
            rows = self._runs[part.run]
            cut = (span.cut(part.token_begin, part.token_end) for span in rows.spans)
            found.append(UsedRows(rows, [span for span in cut if len(span)]))
        return found

    def evict(self, number: int) -> bool:
        """Gives the blocks of a run up; they are free when nobody reads them. False where it is not held."""
        rows = self._runs.pop(number, None)
        if rows is not None:
            self._pool.free(rows.blocks)
        return rows is not None

    def clear(self) -> None:
        """Gives everything up: the epoch is over."""
        for number in list(self._runs):
            self.evict(number)

    @property
    def num_blocks(self) -> int:
        """Blocks that hold nothing but cached KV."""
        owners = self._pool.owners
        return sum(owners[block] == 1 for rows in self._runs.values() for block in rows.blocks)
