"""What the exchange schedules of CSA share: what travels between ranks, counted in bytes, and FLOPs. Pure.

Every rank makes the same plan from the same numbers, so nothing about shapes ever travels. What it sees within
its own blocks a rank computes itself (`local`); what lies across ranks goes stage by stage (`across`).

    in:   source -> peer   for each stage  [K | V | Q, as the schedule wants them], or [tail Q] [sink K | V]
    out:  peer -> source   for each stage  [O | LSE of those Q]
"""

from abc import ABC
from collections.abc import Iterator
from dataclasses import dataclass

from sps2_engine.attention.across import StagedPlan
from sps2_engine.attention.pieces import LSE_BYTES, Plane, Stage


@dataclass(frozen=True)
class AttentionPlan(StagedPlan, ABC):
    """CSA of one prompt on P ranks by one exchange schedule."""

    def in_planes(self, source: int, peer: int, layer: int, stage: Stage) -> Iterator[Plane]:
        """What `source` sends to `peer` before compute, in order."""
        return (plane for sender, plane in self._inbound(peer, layer, stage) if sender == source)

    def _inbound(self, peer: int, layer: int, stage: Stage) -> Iterator[tuple[int, Plane]]:
        """(source, plane) of all that comes to `peer` before compute, in the order of each source."""
        sent: set[tuple[int, Plane]] = set()
        for work in self.works(peer, layer, stage):
            for holder, sample in work.keys if work.brings_keys else ():
                keys = Plane("k", work.level, work.run.kv_heads, sample)
                if holder != peer and (holder, keys) not in sent:
                    sent.add((holder, keys))
                    yield holder, keys
                    yield holder, Plane("v", work.level, work.run.kv_heads, sample)
            if work.query_rank != peer:
                yield work.query_rank, work.query_plane
        for source in range(self.num_ranks) if not stage.level else ():
            for sinks in self.sinks_sent(source, peer) if source != peer else ():
                yield source, Plane("k", 0, self.all_heads.kv_heads, sinks)
                yield source, Plane("v", 0, self.all_heads.kv_heads, sinks)

    def out_planes(self, source: int, peer: int, layer: int, stage: Stage) -> Iterator[Plane]:
        """The queries of `peer` for which `source` returns [O | LSE], in order."""
        if source != peer:
            for work in self.works(source, layer, stage):
                if work.query_rank == peer:
                    yield work.query_plane

    def moved_bytes(self, layer: int = 0) -> list[list[int]]:
        """Bytes posted for one layer, in and out, by source rank and then by the rank that they go to."""
        vector = self.head_dim * self.element_bytes
        moved = [[0] * self.num_ranks for _ in range(self.num_ranks)]
        for stage in self.stages():
            for rank in range(self.num_ranks):
                for source, plane in self._inbound(rank, layer, stage):
                    moved[source][rank] += plane.num_vectors * vector
                for work in self.works(rank, layer, stage) if self.returns(stage) else ():
                    if work.query_rank != rank:
                        moved[rank][work.query_rank] += work.query_plane.num_vectors * (vector + LSE_BYTES)
        return moved

    def sent_bytes(self, rank: int, layer: int = 0) -> int:
        """Bytes that a rank posts for one layer, in and out."""
        return sum(self.moved_bytes(layer)[rank])

    def bytes_per_layer(self, layer: int = 0) -> int:
        """Bytes that all ranks together post for one layer, in and out."""
        return sum(map(sum, self.moved_bytes(layer)))

    def pairs(self, rank: int, layer: int) -> int:
        """Visible (query, key, query head) triples that `rank` computes; 4 * head_dim FLOPs each."""
        local = [*self.own_shards(rank, self.all_heads), *self.local_work(rank, layer)]
        across = (work for stage in self.stages() for work in self.works(rank, layer, stage))
        return sum(work.pairs for work in local) + sum(work.pairs for work in across)

    def flops_per_layer(self, layer: int = 0) -> int:
        """4 * D * visible pairs, all ranks and query heads."""
        return 4 * self.head_dim * sum(self.pairs(rank, layer) for rank in range(self.num_ranks))
