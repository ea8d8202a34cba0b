"""CSA over ranks by exchange of heads: one packed all-to-all in and one out for each layer.

Own-shard attention runs between the first post and its wait, what else is local between the second and its: so both
exchanges hide behind compute. What is computed and what travels is the plan's; here it is done.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor

from sps2_engine.attention.csa_plan import LSE_BYTES, CsaPlan, LocalWork, Plane, PlaneKey, Rectangle
from sps2_engine.attention.sliced import sliced_attention
from sps2_engine.collectives import Communicator, PendingExchange
from sps2_engine.slices import Slicer, Stage
from sps2_kernels.merge_states import merge_pair
from sps2_layout.layout import Sample, Span

KIND = "all_to_all"
"""Name of the byte counter."""

State = tuple[Tensor, Tensor]
"""o [rows, heads, head_dim] and its log-sum-exp [rows, heads] fp32."""


class CsaSchedule:
    """Attention of one prompt on one rank; made once for a prompt and called for each layer in turn."""

    def __init__(
        self, plan: CsaPlan, communicator: Communicator, scale: float, slicer: Slicer | None = None
    ) -> None:
        """With a `slicer` the group agrees at the ends of its slices whether to go on."""
        self._plan = plan
        self._slicer = slicer or Slicer.endless()
        self._communicator = communicator
        self._scale = scale
        self._rank = communicator.rank
        self._routes: dict[int, _Routes] = {}
        """What travels, by phase of the layer."""
        self.exposed_s = 0.0
        """Seconds spent waiting for exchanges with nothing left to compute."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of this rank's tokens over all that they see.

        Args:
            layer: index of the layer (what a level samples depends on it).
            q: [own tokens, q_heads, head_dim], rotated.
            k, v: [own tokens, kv_heads, head_dim].

        Returns:
            o [own tokens, q_heads, head_dim].

        Raises:
            GroupError: an exchange failed.
        """
        routes = self._routes_of(layer)
        step = _LayerStep(
            self._plan, routes, self._rank, layer, (q, k, v), self._scale, self._slicer.slice_flops
        )
        if not self._plan.exchanges:
            with self._slicer.stage(*routes.own_flops) as stage:
                state = step.own_shards(stage)
            with self._slicer.stage(*routes.local_flops) as stage:
                step.local(state, stage)
            return state[0]
        pending = self._communicator.all_to_all(step.pack_in(), routes.in_sent, routes.in_received, KIND)
        with self._slicer.stage(*routes.own_flops) as stage:
            state = step.own_shards(stage)
        step.take_in(self._wait(pending))
        with self._slicer.stage(*routes.rectangle_flops) as stage:
            step.rectangles(stage)
        pending = self._communicator.all_to_all(step.pack_out(), routes.out_sent, routes.out_received, KIND)
        with self._slicer.stage(*routes.local_flops) as stage:
            step.local(state, stage)
        step.take_out(state, self._wait(pending))
        return state[0]

    def _routes_of(self, layer: int) -> "_Routes":
        phase = self._plan.phase(layer)
        if phase not in self._routes:
            self._routes[phase] = _Routes(self._plan, self._rank, layer)
        return self._routes[phase]

    def _wait(self, pending: PendingExchange) -> Tensor:
        started = time.perf_counter()
        received = pending.wait()
        self.exposed_s += time.perf_counter() - started
        return received


class _Routes:
    """What one rank exchanges in layers of one phase: planes and bytes by peer."""

    def __init__(self, plan: CsaPlan, rank: int, layer: int) -> None:
        self._plan = plan
        self._rank = rank
        peers = range(plan.num_ranks)
        self.in_planes_sent = [tuple(plan.in_planes(rank, peer, layer)) for peer in peers]
        self.in_planes_received = [tuple(plan.in_planes(peer, rank, layer)) for peer in peers]
        self.out_planes_sent = [tuple(plan.out_planes(rank, peer, layer)) for peer in peers]
        self.out_planes_received = [tuple(plan.out_planes(peer, rank, layer)) for peer in peers]
        self.in_sent = [plan.in_bytes(rank, peer, layer) for peer in peers]
        self.in_received = [plan.in_bytes(peer, rank, layer) for peer in peers]
        self.out_sent = [plan.out_bytes(rank, peer, layer) for peer in peers]
        self.out_received = [plan.out_bytes(peer, rank, layer) for peer in peers]
        self.rectangles = tuple(plan.rectangles(rank, layer))
        self.tail_ranks = plan.tail_ranks(rank)
        self.own_flops = self._flops(plan.own_pairs)
        """FLOPs of the own shards: the busiest rank's, and this one's. So for the other two stages."""
        self.rectangle_flops = self._flops(lambda one: plan.rectangle_pairs(one, layer))
        self.local_flops = self._flops(lambda one: plan.local_pairs(one, layer))

    def _flops(self, pairs: Callable[[int], int]) -> tuple[int, int]:
        most = max(pairs(peer) for peer in range(self._plan.num_ranks))
        return 4 * self._plan.head_dim * most, 4 * self._plan.head_dim * pairs(self._rank)


class _LayerStep:
    """One layer's tensors on their way through the schedule; its methods are called in the order they stand."""

    def __init__(
        self,
        plan: CsaPlan,
        routes: _Routes,
        rank: int,
        layer: int,
        qkv: tuple[Tensor, Tensor, Tensor],
        scale: float,
        piece_flops: int,
    ) -> None:
        self._plan = plan
        self._piece_flops = piece_flops
        self._routes = routes
        self._rank = rank
        self._layer = layer
        self._tensors = dict(zip("qkv", qkv, strict=True))
        self._scale = scale
        self._own = plan.tokens(rank)
        self._received: dict[tuple[PlaneKey, int], Tensor] = {}
        """Planes by key and source rank."""
        self._results: dict[tuple[int, int, int], State] = {}
        """What this rank computed for its group, by level, first query head and the rank whose queries they are."""

    def pack_in(self) -> Tensor:
        """All planes for the peers, in the plan's order, as bytes."""
        q = self._tensors["q"]
        packed = q.new_empty(sum(self._routes.in_sent) // q.element_size())
        offset = 0
        for plane in chain.from_iterable(self._routes.in_planes_sent):
            offset = _put(packed, offset, self._own_plane(plane))
        return packed.view(torch.uint8)

    def own_shards(self, stage: Stage) -> State:
        """Each hosted shard by itself: the first state of every query."""
        q = self._tensors["q"]
        works = list(self._plan.own_shards(self._rank))
        if len(works) == 1:
            return self._attend(works[0], stage)
        o, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        for work in works:
            rows = self._rows(work.queries)
            o[rows], lse[rows] = self._attend(work, stage)
        return o, lse

    def take_in(self, received: Tensor) -> None:
        """Finds the planes in the received bytes; nothing is copied."""
        elements, offset = received.view(self._tensors["q"].dtype), 0
        for source, planes in enumerate(self._routes.in_planes_received):
            for plane in planes:
                shape = (len(plane.rows), len(plane.heads), self._plan.head_dim)
                end = offset + shape[0] * shape[1] * shape[2]
                self._received[plane.key, source] = elements[offset:end].view(shape)
                offset = end

    def rectangles(self, stage: Stage) -> None:
        """This rank's share of what the ranks of its groups see of each other, and of the tails."""
        for group in _by_run(self._routes.rectangles):
            # Each rank sees all that the one before it sees: the last one's keys hold everybody's.
            keys, values = (self._gather(tensor, group[-1]) for tensor in ("k", "v"))
            for rectangle in group:
                count = rectangle.num_keys
                result = self._sliced(self._queries_of(rectangle), keys[:count], values[:count], stage)
                place = (rectangle.level, rectangle.run.q_heads.begin, rectangle.query_rank)
                self._results[place] = result
        for tail_rank in self._routes.tail_ranks:
            q = self._received[("q", 0, 0), tail_rank]
            k, v = self._tensors["k"], self._tensors["v"]
            self._results[0, 0, tail_rank] = self._sliced(q, k, v, stage)

    def pack_out(self) -> Tensor:
        """[O | LSE] of every plane of queries that came, in the plan's order, as bytes."""
        device = self._tensors["q"].device
        packed = torch.empty(sum(self._routes.out_sent), dtype=torch.uint8, device=device)
        offset = 0
        for peer, planes in enumerate(self._routes.out_planes_sent):
            for plane in planes:
                for part in self._results.pop((plane.level, plane.heads.begin, peer)):
                    offset = _put(packed, offset, part.contiguous().view(torch.uint8))
        return packed

    def local(self, state: State, stage: Stage) -> None:
        """Merges into `state` what this rank sees across its own shards, and of the sinks."""
        for work in self._plan.local_work(self._rank, self._layer):
            _merge(state, self._rows(work.queries), work.run.q_heads, self._attend(work, stage))

    def take_out(self, state: State, returned: Tensor) -> None:
        """Merges into `state` this rank's own rectangles and those that the peers return."""
        head_dim, dtype = self._plan.head_dim, self._tensors["q"].dtype
        for rectangle in self._routes.rectangles:
            if rectangle.query_rank == self._rank:
                result = self._results.pop((rectangle.level, rectangle.run.q_heads.begin, self._rank))
                _merge(state, self._rows(rectangle.queries), rectangle.run.q_heads, result)
        offset = 0
        for plane in chain.from_iterable(self._routes.out_planes_received):
            rows, heads = len(plane.rows), len(plane.heads)
            middle = offset + rows * heads * head_dim * dtype.itemsize
            end = middle + rows * heads * LSE_BYTES
            o = returned[offset:middle].view(dtype).view(rows, heads, head_dim)
            lse = _as_fp32(returned[middle:end]).view(rows, heads)
            _merge(state, self._rows(plane.rows), plane.heads, (o, lse))
            offset = end

    def _attend(self, work: LocalWork, stage: Stage) -> State:
        q = self._tensors["q"][self._rows(work.queries), work.run.q_heads.slice]
        k, v = (self._local_keys(tensor, work) for tensor in ("k", "v"))
        return self._sliced(q, k, v, stage, causal=work.causal)

    def _sliced(self, q: Tensor, k: Tensor, v: Tensor, stage: Stage, *, causal: bool = False) -> State:
        return sliced_attention(
            q, k, v, self._scale, causal=causal, piece_flops=self._piece_flops, stage=stage
        )

    def _local_keys(self, tensor: str, work: LocalWork) -> Tensor:
        """Keys (or values) of local work: this rank's own, after the sinks that it was sent."""
        heads = work.run.kv_heads.slice
        if work.keys.span.begin >= self._own.begin:
            return self._tensors[tensor][self._rows(work.keys), heads]
        holders = (holder for holder in range(self._rank) if len(self._plan.sink_keys(holder)))
        sinks = [self._received[(tensor, 0, 0), holder] for holder in holders]
        own = work.keys.span.cut(self._own.begin, self._own.end)
        if len(own):
            sinks.append(self._tensors[tensor][self._rows(Sample(own, 1, 0))])
        return torch.cat(sinks) if len(sinks) > 1 else sinks[0]

    def _gather(self, tensor: str, rectangle: Rectangle) -> Tensor:
        """Keys (or values) of all ranks that a rectangle reads, in token order: [keys, kv_heads, head_dim]."""
        parts = []
        for holder, sample in rectangle.keys:
            if holder == self._rank:
                parts.append(self._tensors[tensor][self._rows(sample), rectangle.run.kv_heads.slice])
            else:
                parts.append(self._received[(tensor, rectangle.level, rectangle.run.kv_heads.begin), holder])
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _queries_of(self, rectangle: Rectangle) -> Tensor:
        if rectangle.query_rank == self._rank:
            return self._tensors["q"][self._rows(rectangle.queries), rectangle.run.q_heads.slice]
        key = ("q", rectangle.level, rectangle.run.q_heads.begin)
        return self._received[key, rectangle.query_rank]

    def _own_plane(self, plane: Plane) -> Tensor:
        return self._tensors[plane.tensor][self._rows(plane.rows), plane.heads.slice]

    def _rows(self, sample: Sample) -> slice:
        """A sample of this rank's tokens as an index into its tensors: a strided view, no copy."""
        return slice(sample.first - self._own.begin, sample.span.end - self._own.begin, sample.stride)


def _by_run(rectangles: Iterable[Rectangle]) -> Iterator[list[Rectangle]]:
    """Rectangles of the same level and heads together; the plan yields them in that order."""
    group: list[Rectangle] = []
    for rectangle in rectangles:
        if group and (group[0].level, group[0].run) != (rectangle.level, rectangle.run):
            yield group
            group = []
        group.append(rectangle)
    if group:
        yield group


def _merge(state: State, rows: slice, heads: Span, part: State) -> None:
    """Merges a part into the rows and heads of the state that it is of, in place: the state is the schedule's own."""
    o, lse = state[0][rows, heads.slice], state[1][rows, heads.slice]
    o[...], lse[...] = merge_pair(o, lse, *part)


def _as_fp32(raw: Tensor) -> Tensor:
    """Bytes as fp32; copied only where bf16 planes before them leave them misaligned."""
    return (raw if raw.storage_offset() % 4 == 0 else raw.clone()).view(torch.float32)


def _put(packed: Tensor, offset: int, plane: Tensor) -> int:
    """Copies a plane into the flat buffer at `offset` (elements) and returns the offset behind it."""
    end = offset + plane.numel()
    packed[offset:end].view(plane.shape).copy_(plane)
    return end
