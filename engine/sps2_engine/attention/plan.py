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
        for sinks in self.sinks_sent(source, peer) if not stage.level else ():
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

    def pairs(self, rank: int, layer: int) -> int:
        """Visible (query, key, query head) triples that `rank` computes; 4 * head_dim FLOPs each."""
        local = [*self.own_shards(rank, self.all_heads), *self.local_work(rank, layer)]
        across = (work for stage in self.stages() for work in self.works(rank, layer, stage))
        return sum(work.pairs for work in local) + sum(work.pairs for work in across)

    def flops_per_layer(self, layer: int = 0) -> int:
        """4 * D * visible pairs, all ranks and query heads."""
        return 4 * self.head_dim * sum(self.pairs(rank, layer) for rank in range(self.num_ranks))
