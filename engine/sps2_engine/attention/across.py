"""What lies across ranks: the stages of a layer and what each rank computes in them. Pure.

Levels are each schedule's own, chunk by chunk. Queries of the prompt's tail go to every rank that holds keys, and
partial outputs come back, as in decode. Sinks are copied to every rank.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from sps2_engine.attention.local import LocalPlan
from sps2_engine.attention.pieces import Stage, Work
from sps2_layout.layout import Sample

MAX_CHUNKS = 4
"""More chunks hide no more: the first in and the last out are already an eighth of what travels."""


@dataclass(frozen=True)
class StagedPlan(LocalPlan):
    """A plan with the stages of its exchanges; what they are is for a schedule to say."""

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
            keys = self.dense_keys(holder, self.block_tokens(block).begin)
            if self.owner(block) != holder and len(queries) and keys:
                yield Work(0, self.all_heads, self.owner(block), queries, keys)

    def sinks_sent(self, source: int, peer: int) -> Iterator[Sample]:
        """Sinks of `source`, block by block, that queries of `peer` outside the tail need."""
        body = self.layout.tail_span.begin
        for block in self.blocks(source):
            sinks = self.sinks_of(block, self.layout.num_tokens)
            later = (self.block_tokens(other) for other in self.blocks(peer) if other > block)
            if len(sinks) and any(len(span.cut(0, body)) for span in later):
                yield sinks
