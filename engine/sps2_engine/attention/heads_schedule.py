"""Exact prefill attention over ranks by exchange of heads: one packed all-to-all in and one out for each layer.

Own-shard attention runs between the posts and the waits, so it hides both exchanges.
"""

import time

import torch
from sps2_kernels.merge_states import merge_pair
from sps2_kernels.segment_attention import UNMASKED, segment_attention
from torch import Tensor

from sps2_engine.attention.prefill_plan import PrefillPlan, Span, head_runs
from sps2_engine.collectives import Communicator, PendingExchange

KIND = "all_to_all"
"""Name of the byte counter."""


class HeadsSchedule:
    """Attention of one prompt on one rank; made once for a prompt and called for each layer in turn."""

    def __init__(self, plan: PrefillPlan, communicator: Communicator, scale: float) -> None:
        self._plan = plan
        self._communicator = communicator
        self._scale = scale
        self._rank = communicator.rank
        self._own = plan.slices[self._rank]
        self._heads = plan.q_heads[self._rank]
        self.exposed_s = 0.0
        """Seconds spent waiting for exchanges with nothing left to compute."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of this rank's slice over all earlier tokens and itself.

        Args:
            q: [own tokens, q_heads, head_dim], rotated.
            k, v: [own tokens, kv_heads, head_dim].

        Returns:
            o [own tokens, q_heads, head_dim].

        Raises:
            GroupError: an exchange failed.
        """
        if not self._plan.exchanges:
            return segment_attention(q, k, v, 0, self._scale)[0]
        ranks = range(self._plan.num_ranks)
        pending_in = self._communicator.all_to_all(
            self._pack_in(q, k, v),
            [self._plan.in_bytes(self._rank, peer) for peer in ranks],
            [self._plan.in_bytes(peer, self._rank) for peer in ranks],
            KIND,
        )
        o, lse = segment_attention(q, k, v, 0, self._scale)
        received = self._timed_wait(pending_in)
        own_state, packed = self._rectangles(q, k, v, received)
        pending_out = self._communicator.all_to_all(
            packed,
            [self._plan.out_bytes(self._rank, peer) for peer in ranks],
            [self._plan.out_bytes(peer, self._rank) for peer in ranks],
            KIND,
        )
        returned = self._timed_wait(pending_out)
        if self._plan.sends_q(self._rank):
            self._merge_returned(o, lse, returned, own_state)
        return o

    def _timed_wait(self, pending: PendingExchange) -> Tensor:
        started = time.perf_counter()
        received = pending.wait()
        self.exposed_s += time.perf_counter() - started
        return received

    def _pack_in(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[K | V | Q] planes for each peer in rank order, as bytes; each plane is [tokens, heads, head_dim]."""
        plan, rank = self._plan, self._rank
        total = sum(plan.in_bytes(rank, peer) for peer in range(plan.num_ranks))
        packed = torch.empty(total // plan.element_bytes, dtype=q.dtype, device=q.device)
        offset = 0
        for peer in range(plan.num_ranks):
            if peer == rank:
                continue
            kv_heads, q_heads = plan.kv_heads(peer), plan.q_heads[peer]
            if plan.kv_plane_bytes(rank, peer):
                offset = _put(packed, offset, k[:, kv_heads.begin : kv_heads.end])
                offset = _put(packed, offset, v[:, kv_heads.begin : kv_heads.end])
            if plan.q_plane_bytes(rank, peer):
                offset = _put(packed, offset, q[:, q_heads.begin : q_heads.end])
        return packed.view(torch.uint8)

    def _rectangles(
        self, q: Tensor, k: Tensor, v: Tensor, received: Tensor
    ) -> tuple[tuple[Tensor, Tensor] | None, Tensor]:
        """Computes, for this rank's heads, every slice's queries over all keys before the slice.

        Returns:
            The state (o [own tokens, share, head_dim], lse [own tokens, share]) of this rank's own queries, or
            None where they see nothing earlier; and the packed [O | LSE] bytes for the peers.
        """
        plan, rank = self._plan, self._rank
        keys, values, queries = self._unpack_in(q, k, v, received.view(q.dtype))
        own_state: tuple[Tensor, Tensor] | None = None
        total = sum(plan.out_bytes(rank, peer) for peer in range(plan.num_ranks))
        packed = torch.empty(total, dtype=torch.uint8, device=q.device)
        offset = 0
        for peer in range(plan.num_ranks):
            if not plan.sends_q(peer) or not len(self._heads):
                continue
            before = plan.slices[peer].begin
            o, lse = self._rectangle(queries[peer], keys[:before], values[:before])
            if peer == rank:
                own_state = (o, lse)
            else:
                offset = _put(packed, offset, o.contiguous().view(torch.uint8))
                offset = _put(packed, offset, lse.contiguous().view(torch.uint8))
        return own_state, packed

    def _rectangle(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Queries of this rank's heads over whole earlier slices: q [tokens, share, d], k, v [keys, kv share, d]."""
        kv_first = self._plan.kv_heads(self._rank).begin
        states = []
        for run in head_runs(self._heads, self._plan.group):
            q_run = _shift(run.q_heads, self._heads.begin)
            kv_run = _shift(run.kv_heads, kv_first)
            states.append(segment_attention(q[:, q_run], k[:, kv_run], v[:, kv_run], UNMASKED, self._scale))
        if len(states) == 1:
            return states[0]
        return torch.cat([o for o, _ in states], dim=1), torch.cat([lse for _, lse in states], dim=1)

    def _unpack_in(
        self, q: Tensor, k: Tensor, v: Tensor, received: Tensor
    ) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """Gathers this rank's heads of all keys and values before the last slice, in token order, and the queries
        of each rank that has any."""
        plan, rank = self._plan, self._rank
        kv_heads, q_heads = plan.kv_heads(rank), self._heads
        num_keys = plan.slices[plan.last_rank].begin
        keys = q.new_empty(num_keys, len(kv_heads), plan.head_dim)
        values = torch.empty_like(keys)
        queries: dict[int, Tensor] = {}
        offset = 0
        for source in range(plan.num_ranks):
            span = plan.slices[source]
            if source == rank:
                if plan.sends_kv(rank):
                    keys[span.begin : span.end] = k[:, kv_heads.begin : kv_heads.end]
                    values[span.begin : span.end] = v[:, kv_heads.begin : kv_heads.end]
                queries[rank] = q[:, q_heads.begin : q_heads.end]
                continue
            if plan.kv_plane_bytes(source, rank):
                for target in (keys, values):
                    part = target[span.begin : span.end]
                    part.copy_(received[offset : offset + part.numel()].view(part.shape))
                    offset += part.numel()
            if plan.q_plane_bytes(source, rank):
                count = len(span) * len(q_heads) * plan.head_dim
                queries[source] = received[offset : offset + count].view(len(span), len(q_heads), plan.head_dim)
                offset += count
        return keys, values, queries

    def _merge_returned(
        self, o: Tensor, lse: Tensor, returned: Tensor, own_state: tuple[Tensor, Tensor] | None
    ) -> None:
        """Merges, head share by head share, the rectangle states into the own-shard state, in place in `o`, which
        this schedule made and nobody else has seen."""
        plan = self._plan
        num_tokens = len(self._own)
        offset = 0
        for peer in range(plan.num_ranks):
            heads = plan.q_heads[peer]
            if not len(heads):
                continue
            if peer == self._rank:
                if own_state is None:
                    continue
                part_o, part_lse = own_state
            else:
                o_bytes, lse_bytes = plan.q_plane_bytes(self._rank, peer), plan.lse_plane_bytes(self._rank, peer)
                part_o = returned[offset : offset + o_bytes].view(o.dtype)
                part_o = part_o.view(num_tokens, len(heads), plan.head_dim)
                offset += o_bytes
                part_lse = _as_fp32(returned[offset : offset + lse_bytes]).view(num_tokens, len(heads))
                offset += lse_bytes
            share = slice(heads.begin, heads.end)
            o[:, share], _ = merge_pair(o[:, share], lse[:, share], part_o, part_lse)


def _as_fp32(raw: Tensor) -> Tensor:
    """Bytes as fp32; copied only where bf16 planes before them leave them misaligned."""
    return (raw if raw.storage_offset() % 4 == 0 else raw.clone()).view(torch.float32)


def _shift(span: Span, by: int) -> slice:
    return slice(span.begin - by, span.end - by)


def _put(packed: Tensor, offset: int, plane: Tensor) -> int:
    """Copies a plane into the flat buffer at `offset` (elements) and returns the offset behind it."""
    end = offset + plane.numel()
    packed[offset:end].view(plane.shape).copy_(plane)
    return end
