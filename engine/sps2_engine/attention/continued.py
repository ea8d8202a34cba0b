"""Attention of a text whose beginning is cached: the rest are dense queries over what is cached and over each other.

    post Q to the ranks that hold some of the beginning     asynchronous
    the rest among itself, by the schedule of its plan      hides it
    attention over the cached keys here; post O and LSE back
    wait; merge

The decode path with many rows at once: keys stay where they lie, whatever ranks have computed them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sps2_engine.attention.csa_schedule import IN_LANE, KIND, OUT_LANE, CsaSchedule
from sps2_engine.attention.pieces import LSE_BYTES
from sps2_engine.attention.sliced import State, segment_flops, sliced_attention
from sps2_engine.collectives import Communicator
from sps2_engine.slices import Slicer
from sps2_kernels.merge_states import merge_into

ReadKeys = Callable[[int], Sequence[tuple[Tensor, Tensor]]]
"""Gives the cached keys and values of a layer on this rank, run by run: each [keys, kv_heads, head_dim]."""


@dataclass(frozen=True)
class CachedKeys:
    """Who holds how much of the beginning, and how many queries each rank has."""

    num_keys: Sequence[int]
    """Cached tokens, by sequence rank."""
    num_queries: Sequence[int]
    """Tokens that each computes."""

    def in_bytes(self, source: int, peer: int, vector_bytes: int) -> int:
        """What a rank sends of its queries, `vector_bytes` for each, all heads."""
        return self.num_queries[source] * vector_bytes if source != peer and self.num_keys[peer] else 0

    def out_bytes(self, source: int, peer: int, vector_bytes: int) -> int:
        """What comes back for the queries of `peer`."""
        return self.in_bytes(peer, source, vector_bytes)

    def sent_bytes(self, rank: int, vector_bytes: int, lse_bytes: int) -> int:
        """What a rank posts for one layer, in and out."""
        ranks = range(len(self.num_keys))
        ins = sum(self.in_bytes(rank, peer, vector_bytes) for peer in ranks)
        return ins + sum(self.out_bytes(rank, peer, vector_bytes + lse_bytes) for peer in ranks)


class ContinuedSchedule:
    """Attention of one text on one rank; made once for it and called for each layer in turn.

    Args:
        schedule: of the rest among itself.
        cached: the same on every rank.
        read_keys: this rank's part of the beginning.
        communicator: all sequence ranks.
        scale: factor on the scores.
        slicer: that of the schedule.
    """

    def __init__(
        self,
        schedule: CsaSchedule,
        cached: CachedKeys,
        read_keys: ReadKeys,
        communicator: Communicator,
        scale: float,
        slicer: Slicer | None = None,
    ) -> None:
        self._schedule = schedule
        self._cached = cached
        self._read_keys = read_keys
        self._communicator = communicator
        self._scale = scale
        self._slicer = slicer or Slicer.endless()
        self._ranks = range(len(cached.num_keys))
        self._exchanges = any(
            cached.in_bytes(source, peer, 1) for source in self._ranks for peer in self._ranks
        )

    @property
    def exposed_s(self) -> float:
        """Seconds spent waiting for exchanges of the rest with nothing left to compute."""
        return self._schedule.exposed_s

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of this rank's part of the rest over all that comes before each token of it.

        Args:
            layer: index of the layer.
            q: [own tokens, q_heads, head_dim], rotated.
            k: [own tokens, kv_heads, head_dim], rotated.
            v: [own tokens, kv_heads, head_dim].

        Returns:
            o [own tokens, q_heads, head_dim].

        Raises:
            GroupError: an exchange failed.
        """
        rank, ranks = self._communicator.rank, self._ranks
        vector = q.shape[1] * q.shape[2] * q.element_size()
        lse_bytes = q.shape[1] * LSE_BYTES
        if self._exchanges:
            sent = [self._cached.in_bytes(rank, peer, vector) for peer in ranks]
            come = [self._cached.in_bytes(peer, rank, vector) for peer in ranks]
            packed = q.reshape(-1).view(torch.uint8).repeat(sum(size > 0 for size in sent))
            queries = self._communicator.all_to_all(packed, sent, come, KIND, IN_LANE)
        o, lse = self._schedule.state(layer, q, k, v)
        if not self._exchanges:
            merge_into(o, lse, *self._over_cached(layer, q))
            return o
        rows = [part.view(q.dtype).view(-1, *q.shape[1:]) for part in queries.wait().split_with_sizes(come)]
        rows[rank] = q
        states = self._over_cached(layer, torch.cat(rows))
        by_peer = list(
            zip(*(part.split_with_sizes([len(one) for one in rows]) for part in states), strict=True)
        )
        sent = [self._cached.out_bytes(rank, peer, vector + lse_bytes) for peer in ranks]
        come = [self._cached.out_bytes(peer, rank, vector + lse_bytes) for peer in ranks]
        packed = _pack([state for state, size in zip(by_peer, sent, strict=True) if size], q)
        back = self._communicator.all_to_all(packed, sent, come, KIND, OUT_LANE)
        merge_into(o, lse, *by_peer[rank])
        for part in back.wait().split_with_sizes(come):
            if len(part):
                part_o, part_lse = part[: len(q) * vector], part[len(q) * vector :]
                merge_into(
                    o, lse, part_o.view(q.dtype).view(q.shape), part_lse.view(lse.dtype).view(lse.shape)
                )
        return o

    def _over_cached(self, layer: int, q: Tensor) -> State:
        """These queries over all cached keys of this rank; one that has none stays in step with the others."""
        o = torch.zeros_like(q, dtype=torch.promote_types(q.dtype, torch.float32))
        lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
        with self._slicer.stage(*self._flops(q)) as stage:
            for k, v in self._read_keys(layer):
                piece_flops = self._slicer.slice_flops
                part = sliced_attention(
                    q, k, v, self._scale, causal=False, piece_flops=piece_flops, stage=stage
                )
                merge_into(o, lse, *part)
        return o, lse

    def _flops(self, q: Tensor) -> tuple[int, int]:
        """Work of the busiest rank and of this one."""
        num_queries, keys = sum(self._cached.num_queries), self._cached.num_keys
        most, own = (
            segment_flops(num_queries, some, q.shape[1], q.shape[2], causal=False)
            for some in (max(keys), keys[self._communicator.rank])
        )
        return most, own


def _pack(states: Sequence[State], like: Tensor) -> Tensor:
    """[O | LSE] of each, o in the dtype of the queries, as bytes."""
    if not states:
        return like.new_empty(0, dtype=torch.uint8)
    planes = [plane.reshape(-1).view(torch.uint8) for o, lse in states for plane in (o.to(like.dtype), lse)]
    return torch.cat(planes)
