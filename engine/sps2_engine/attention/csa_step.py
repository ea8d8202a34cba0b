"""One layer's tensors on their way through CSA: packs, attends, merges; posts and waits for nothing."""

from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from sps2_engine.attention.pieces import LSE_BYTES, HeadRun, Plane, Work
from sps2_engine.attention.plan import AttentionPlan
from sps2_engine.attention.routes import KeyRun, Leg, Route, Routes, key_run
from sps2_engine.attention.sliced import SegmentAttention, State, sliced_attention
from sps2_engine.slices import Stage
from sps2_kernels.merge_states import merge_into


class LayerStep:
    """One layer of one rank; made for each, its methods are called in the order in which they stand."""

    def __init__(
        self,
        plan: AttentionPlan,
        routes: Routes,
        rank: int,
        qkv: tuple[Tensor, Tensor, Tensor],
        scale: float,
        piece_flops: int,
        attention: SegmentAttention,
    ) -> None:
        self._plan = plan
        self._routes = routes
        self._rank = rank
        self._tensors = dict(zip("qkv", qkv, strict=True))
        self._scale = scale
        self._piece_flops = piece_flops
        self._attention = attention
        q = qkv[0]
        # What is merged piece by piece is kept wide: in bf16 each merge would round it again.
        self.o = torch.empty_like(q, dtype=torch.promote_types(q.dtype, torch.float32))
        """[own tokens, q_heads, head_dim], fp32 or wider: whole when all has been merged."""
        self.lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        """Its log-sum-exp, [own tokens, q_heads] fp32."""
        self._received: dict[tuple[int, Plane], Tensor] = {}
        """Planes [rows, heads, head_dim] by source rank."""
        self._gathered: dict[KeyRun, tuple[Tensor, Tensor]] = {}
        self._returns: dict[tuple[int, Plane], State] = {}
        """What was computed for other ranks' queries."""
        self._unmerged: list[tuple[Work, State]] = []
        """What was computed for own queries, of whose own shard there may be nothing yet."""

    def pack_in(self, route: Route) -> Tensor:
        """All planes for the peers, in the plan's order, as bytes."""
        q = self._tensors["q"]
        packed = q.new_empty(sum(route.ins.sent_bytes) // q.element_size())
        offset = 0
        for plane in chain.from_iterable(route.ins.sent):
            own = self._tensors[plane.tensor][self._routes.rows(plane.rows), plane.heads.slice]
            offset = _put(packed, offset, own)
        return packed.view(torch.uint8)

    def own_shards(self, run: HeadRun, stage: Stage) -> None:
        """Each hosted shard by itself, for some heads: the first state of their queries."""
        for work in self._routes.own_shards[run]:
            o, lse = self._attend(work, stage)
            if o.shape == self.o.shape:
                self.o, self.lse = o.to(self.o.dtype), lse  # all there is: nothing to copy
                return
            rows, heads = self._routes.rows(work.queries), run.q_heads.slice
            self.o[rows, heads], self.lse[rows, heads] = o, lse

    def take_in(self, route: Route, received: Tensor) -> None:
        """Finds the planes in the received bytes; nothing is copied."""
        elements, offset = received.view(self._tensors["q"].dtype), 0
        for source, planes in enumerate(route.ins.received):
            for plane in planes:
                end = offset + plane.num_vectors * self._plan.head_dim
                shape = len(plane.rows), len(plane.heads), self._plan.head_dim
                self._received[source, plane] = elements[offset:end].view(shape)
                offset = end

    def across(self, route: Route, stage: Stage) -> None:
        """This rank's part of what ranks see of each other in a stage."""
        for work in route.works:
            if work.query_rank == self._rank:
                self._unmerged.append((work, self._attend(work, stage)))
            else:
                self._returns[work.query_rank, work.query_plane] = self._attend(work, stage)

    def pack_out(self, leg: Leg) -> Tensor:
        """[O | LSE] of every plane of queries that came, in the plan's order, as bytes."""
        packed = torch.empty(sum(leg.sent_bytes), dtype=torch.uint8, device=self.o.device)
        offset = 0
        for peer, planes in enumerate(leg.sent):
            for plane in planes:
                o, lse = self._returns.pop((peer, plane))
                o_out, lse_out, offset = self._out_planes(packed, offset, plane)
                o_out.copy_(o)
                lse_out.copy_(lse)
        return packed

    def local(self, stage: Stage) -> None:
        """Merges what was computed here for own queries, and attends to what is left within this rank."""
        for work, state in self._unmerged:
            self._merge(work.query_plane, *state)
        self._unmerged.clear()
        for work in self._routes.local:
            self._merge(work.query_plane, *self._attend(work, stage))

    def take_out(self, leg: Leg, returned: Tensor) -> None:
        """Merges what the peers return for this rank's queries."""
        offset = 0
        for plane in chain.from_iterable(leg.received):
            o, lse, offset = self._out_planes(returned, offset, plane)
            self._merge(plane, o, lse)

    def _out_planes(self, packed: Tensor, offset: int, plane: Plane) -> tuple[Tensor, Tensor, int]:
        """Views of a plane's O and LSE inside packed bytes from `offset` on, and the offset behind them."""
        rows, heads, head_dim = len(plane.rows), len(plane.heads), self._plan.head_dim
        dtype = self._tensors["q"].dtype
        middle = offset + plane.num_vectors * head_dim * dtype.itemsize
        end = middle + plane.num_vectors * LSE_BYTES
        o = packed[offset:middle].view(dtype).view(rows, heads, head_dim)
        return o, packed[middle:end].view(torch.float32).view(rows, heads), end

    def _merge(self, queries: Plane, o: Tensor, lse: Tensor) -> None:
        rows, heads = self._routes.rows(queries.rows), queries.heads.slice
        merge_into(self.o[rows, heads], self.lse[rows, heads], o, lse)

    def _attend(self, work: Work, stage: Stage) -> State:
        if work.query_rank == self._rank:
            q = self._tensors["q"][self._routes.rows(work.queries), work.run.q_heads.slice]
        else:
            q = self._received[work.query_rank, work.query_plane]
        k, v = self._keys(work)
        return sliced_attention(
            q,
            k,
            v,
            self._scale,
            causal=work.causal,
            piece_flops=self._piece_flops,
            stage=stage,
            attention=self._attention,
        )

    def _keys(self, work: Work) -> tuple[Tensor, Tensor]:
        """Keys and values [keys, kv_heads, head_dim] of a work, in token order."""
        if not work.level:
            return self._gather("k", work), self._gather("v", work)
        run = key_run(work)
        if run not in self._gathered:
            longest = self._routes.longest[run]
            self._gathered[run] = self._gather("k", longest), self._gather("v", longest)
        k, v = self._gathered[run]
        return k[: work.num_keys], v[: work.num_keys]

    def _gather(self, tensor: Literal["k", "v"], work: Work) -> Tensor:
        """What its holders have; copied where it lies apart: dilated keys are read a third slower."""
        parts: list[Tensor] = []
        own, heads, rows = self._tensors[tensor], work.run.kv_heads, slice(0, 0)
        for holder, sample in work.keys:
            if holder != self._rank:
                parts.append(self._received[holder, Plane(tensor, work.level, heads, sample)])
                continue
            before, rows = rows, self._routes.rows(sample)
            if parts and before.step == rows.step == 1 and before.stop == rows.start:
                rows = slice(before.start, rows.stop, 1)  # two own blocks are one in the rows of this rank
                parts.pop()
            parts.append(own[rows, heads.slice])
        if len(parts) > 1:
            return torch.cat(parts)
        return parts[0].contiguous() if work.keys[0][1].stride > 1 else parts[0]


def _put(packed: Tensor, offset: int, plane: Tensor) -> int:
    """Copies a plane into the flat buffer at `offset` (elements) and returns the offset behind it."""
    end = offset + plane.numel()
    packed[offset:end].view(plane.shape).copy_(plane)
    return end
