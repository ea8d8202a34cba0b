"""Decode attention over ranks: Q goes to where KV lies, partial outputs come back, two all-to-alls for each layer.

Knows nothing of models, sampling or requests: rows, and the cache slots in which this rank holds their keys.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from sps2_engine.attention.decode_plan import DecodePlan
from sps2_engine.collectives import Communicator, PendingExchange
from sps2_kernels.merge_states import merge_into, merge_pair
from sps2_kernels.paged_decode import PagedRows, SlotRuns, paged_decode_partial
from sps2_kernels.row_ops import append_rows

KIND = "q_exchange"
"""Name of the byte counter."""


@dataclass(frozen=True)
class LayerCache:
    """One layer of the arena: k and v [slots, kv_heads, head_dim]."""

    k: Tensor
    v: Tensor


class QExchange:
    """Attention of a fixed set of rows on one rank; made when the set changes, used step after step.

    A step allocates nothing for the exchange: its buffers and what they are read as are made here.
    """

    def __init__(
        self,
        plan: DecodePlan,
        communicator: Communicator,
        scale: float,
        cache: LayerCache,
        runs: Mapping[int, SlotRuns],
    ) -> None:
        """Plans the exchange.

        Args:
            plan: of the step.
            communicator: of the group.
            scale: factor on the scores.
            cache: any layer of the arena, whose dtype (also that of q) and device are those of all.
            runs: for each row of which this rank holds KV the slots of its keys so far.
        """
        self._plan = plan
        self._communicator = communicator
        self._scale = scale
        rank, ranks = communicator.rank, range(plan.num_ranks)
        device = cache.k.device
        self.home_rows = plan.at_home(rank)
        """Rows whose q, k, v `attend` is given, in this order."""
        place = {row.row_id: index for index, row in enumerate(self.home_rows)}
        sent = [[place[row.row_id] for row in plan.guests(rank, peer)] for peer in ranks]
        guests = [plan.guests(peer, rank) for peer in ranks]
        self._q_sent = [plan.q_bytes(rank, peer) for peer in ranks]
        self._q_received = [plan.q_bytes(peer, rank) for peer in ranks]
        self._out_sent = [plan.out_bytes(rank, peer) for peer in ranks]
        self._out_received = [plan.out_bytes(peer, rank) for peer in ranks]
        self._home_kv = PagedRows([runs[row.row_id] for row in self.home_rows], device)
        self._guest_kv = PagedRows([runs[row.row_id] for rows in guests for row in rows], device)
        self._num_slots = len(cache.k)
        self._new_slots = torch.zeros(len(self.home_rows), dtype=torch.int64, device=device)
        order = [index for part in sent for index in part]
        self._send_order = torch.tensor(order, dtype=torch.int64, device=device)
        heads = (plan.num_q_heads, plan.head_dim)
        self._q_out = torch.empty(len(self._send_order), *heads, dtype=cache.k.dtype, device=device)
        self._q_in = torch.empty(len(self._guest_kv), *heads, dtype=cache.k.dtype, device=device)
        self._out = _OutPlanes(plan, [len(rows) for rows in guests], cache.k)
        self._back = _OutPlanes(plan, [len(part) for part in sent], cache.k)
        self._back_rows = [_as_index(part, device) for part in sent]
        self.exposed_s = 0.0
        """Seconds that this host waited for exchanges, with nothing left to compute."""

    def begin_step(self, new_slots: Sequence[int]) -> None:
        """Takes for each home row the slot that its new key and value go to.

        A row whose last slot it is already (it has ended) writes it again and does not grow.

        Raises:
            IndexError: the arena has no such slot.
        """
        if new_slots and not 0 <= min(new_slots) <= max(new_slots) < self._num_slots:
            raise IndexError(f"slots {new_slots} of {self._num_slots}")
        self._home_kv.append(new_slots)
        self._new_slots.copy_(torch.tensor(new_slots, dtype=torch.int64))

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
            append_rows(k, v, self._new_slots, cache.k, cache.v)
        if not self._plan.exchanges:
            return paged_decode_partial(q, cache.k, cache.v, self._home_kv, self._scale)[0]
        torch.index_select(q, 0, self._send_order, out=self._q_out)
        pending = self._communicator.all_to_all(
            _raw(self._q_out), self._q_sent, self._q_received, KIND, into=_raw(self._q_in)
        )
        o, lse = paged_decode_partial(q, cache.k, cache.v, self._home_kv, self._scale)
        self._wait(pending)
        guest_o, guest_lse = paged_decode_partial(self._q_in, cache.k, cache.v, self._guest_kv, self._scale)
        self._out.pack(guest_o, guest_lse)
        back = self._communicator.all_to_all(
            self._out.raw, self._out_sent, self._out_received, KIND, into=self._back.raw
        )
        self._wait(back)
        for rows, (part_o, part_lse) in zip(self._back_rows, self._back.planes, strict=True):
            _merge_rows(o, lse, rows, part_o, part_lse)
        return o

    def _wait(self, pending: PendingExchange) -> None:
        started = time.perf_counter()
        pending.wait()
        self.exposed_s += time.perf_counter() - started


class _OutPlanes:
    """A buffer of [O | LSE fp32] planes, one pair for each rank, read and written through views."""

    def __init__(self, plan: DecodePlan, num_rows: Sequence[int], like: Tensor) -> None:
        """`num_rows` of each rank; o in the dtype and on the device of `like`."""
        self._num_rows = num_rows
        size = sum(num_rows) * plan.out_row_bytes
        self.raw = torch.empty(size, dtype=torch.uint8, device=like.device)
        """uint8 [bytes]: what travels."""
        self.planes: list[tuple[Tensor, Tensor]] = []
        """For each rank o [rows, q_heads, head_dim] and lse [rows, q_heads] fp32."""
        offset = 0
        for rows in num_rows:
            middle, end = offset + rows * plan.q_row_bytes, offset + rows * plan.out_row_bytes
            o = self.raw[offset:middle].view(like.dtype).view(rows, plan.num_q_heads, plan.head_dim)
            lse = self.raw[middle:end].view(torch.float32).view(rows, plan.num_q_heads)
            self.planes.append((o, lse))
            offset = end

    def pack(self, o: Tensor, lse: Tensor) -> None:
        """Writes the states of all ranks' rows, one rank's after the other's."""
        first = 0
        for rows, (o_plane, lse_plane) in zip(self._num_rows, self.planes, strict=True):
            if rows:
                o_plane.copy_(o[first : first + rows])
                lse_plane.copy_(lse[first : first + rows])
                first += rows


def _raw(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


RowIndex: TypeAlias = slice | Tensor


def _as_index(rows: Sequence[int], device: torch.device) -> RowIndex:
    """The rows as a slice where they follow on each other, so that they are a view."""
    if not rows:
        return slice(0, 0)
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)


def _merge_rows(o: Tensor, lse: Tensor, rows: RowIndex, part_o: Tensor, part_lse: Tensor) -> None:
    """Merges a holder's partial states into those of the rows at home, in fp32."""
    if not len(part_o):
        return
    if isinstance(rows, slice):
        merge_into(o[rows], lse[rows], part_o, part_lse)
    else:
        o[rows], lse[rows] = merge_pair(o[rows], lse[rows], part_o, part_lse)
