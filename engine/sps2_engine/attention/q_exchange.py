"""Decode attention over ranks: Q goes to where KV lies, partial outputs come back, two all-to-alls for each layer.

Knows nothing of models, sampling or requests: rows, and the cache slots in which this rank holds their keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sps2_engine.attention.decode_plan import DecodePlan, DecodeRow
from sps2_engine.collectives import Communicator
from sps2_kernels.merge_states import merge_pair
from sps2_kernels.paged_decode import PagedRows, SlotRuns, paged_decode_partial

KIND = "q_exchange"
"""Name of the byte counter."""


@dataclass(frozen=True)
class LayerCache:
    """One layer of the arena: k and v [slots, kv_heads, head_dim]."""

    k: Tensor
    v: Tensor


class QExchange:
    """Attention of a fixed set of rows on one rank; made when the set changes, used step after step."""

    def __init__(
        self, plan: DecodePlan, communicator: Communicator, scale: float, device: torch.device
    ) -> None:
        """`device` is that of the cache."""
        self._plan = plan
        self._device = device
        self._communicator = communicator
        self._scale = scale
        rank, ranks = communicator.rank, range(plan.num_ranks)
        self.home_rows = plan.at_home(rank)
        """Rows whose q, k, v `attend` is given, in this order."""
        place = {row.row_id: index for index, row in enumerate(self.home_rows)}
        self._sent = [self._index([place[row.row_id] for row in plan.guests(rank, peer)]) for peer in ranks]
        self._send_order = torch.cat(self._sent)
        self._guests: tuple[tuple[DecodeRow, ...], ...] = tuple(plan.guests(peer, rank) for peer in ranks)
        self._q_sent = [plan.q_bytes(rank, peer) for peer in ranks]
        self._q_received = [plan.q_bytes(peer, rank) for peer in ranks]
        self._out_sent = [plan.out_bytes(rank, peer) for peer in ranks]
        self._out_received = [plan.out_bytes(peer, rank) for peer in ranks]
        self._home_kv = PagedRows((), device)
        self._guest_kv: list[PagedRows] = []
        self._new_slots = self._index([])

    def begin_step(self, runs: Mapping[int, SlotRuns], new_slots: list[int]) -> None:
        """Takes what changes from step to step.

        Args:
            runs: for each row of which this rank holds KV (at home: the new token's slot included) its slots.
            new_slots: for each home row the slot that its new key and value go to.
        """
        self._home_kv = self._paged(self.home_rows, runs)
        self._guest_kv = [self._paged(rows, runs) for rows in self._guests]
        self._new_slots = self._index(new_slots)

    def attend(self, cache: LayerCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One layer: appends k and v, then attends over all that the group holds of each home row.

        Args:
            cache: this layer of the arena.
            q: [home rows, q_heads, head_dim], rotated.
            k, v: [home rows, kv_heads, head_dim].

        Returns:
            o [home rows, q_heads, head_dim].

        Raises:
            GroupError: an exchange failed.
        """
        if len(self.home_rows):
            cache.k.index_copy_(0, self._new_slots, k)
            cache.v.index_copy_(0, self._new_slots, v)
        if not self._plan.exchanges:
            return paged_decode_partial(q, cache.k, cache.v, self._home_kv, self._scale)[0]
        outgoing = q.index_select(0, self._send_order).view(-1).view(torch.uint8)
        pending = self._communicator.all_to_all(outgoing, self._q_sent, self._q_received, KIND)
        o, lse = paged_decode_partial(q, cache.k, cache.v, self._home_kv, self._scale)
        packed = self._serve_guests(cache, pending.wait().view(q.dtype))
        returned = self._communicator.all_to_all(packed, self._out_sent, self._out_received, KIND).wait()
        return self._merge_returned(o, lse, returned)

    def _serve_guests(self, cache: LayerCache, received: Tensor) -> Tensor:
        """Partial attention of the other ranks' rows over the keys held here -> packed [O | LSE] by home."""
        plan = self._plan
        packed = torch.empty(sum(self._out_sent), dtype=torch.uint8, device=received.device)
        elements = plan.num_q_heads * plan.head_dim
        taken, offset = 0, 0
        for rows in self._guest_kv:
            if not len(rows):
                continue
            q = received[taken : taken + len(rows) * elements]
            q = q.view(len(rows), plan.num_q_heads, plan.head_dim)
            taken += q.numel()
            o, lse = paged_decode_partial(q, cache.k, cache.v, rows, self._scale)
            for plane in (o, lse):
                raw = plane.view(-1).view(torch.uint8)
                packed[offset : offset + raw.numel()] = raw
                offset += raw.numel()
        return packed

    def _merge_returned(self, o: Tensor, lse: Tensor, returned: Tensor) -> Tensor:
        """Merges each holder's partial states into those of the rows at home, in fp32."""
        plan = self._plan
        offset = 0
        for rows in self._sent:
            if not len(rows):
                continue
            o_end = offset + len(rows) * plan.q_row_bytes
            part_o = returned[offset:o_end].view(o.dtype).view(len(rows), plan.num_q_heads, plan.head_dim)
            offset = o_end + len(rows) * plan.num_q_heads * 4
            part_lse = returned[o_end:offset].view(torch.float32).view(len(rows), plan.num_q_heads)
            o[rows], lse[rows] = merge_pair(o[rows], lse[rows], part_o, part_lse)
        return o

    def _paged(self, rows: tuple[DecodeRow, ...], runs: Mapping[int, SlotRuns]) -> PagedRows:
        return PagedRows(tuple(runs[row.row_id] for row in rows), self._device)

    def _index(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)
