"""One rank's part of a plan, listed once for all layers of a phase. Pure."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from sps2_engine.attention.pieces import LSE_BYTES, HeadRun, Plane, Stage, Work
from sps2_engine.attention.plan import AttentionPlan
from sps2_layout.layout import Sample, Span

StageFlops = tuple[int, int]
"""Work of the plan's busiest rank, which all ranks count alike, and of this one."""

PlanesByPeer = tuple[tuple[Plane, ...], ...]


@dataclass(frozen=True)
class Leg:
    """One exchange, in or out, as one rank sees it."""

    sent: PlanesByPeer
    received: PlanesByPeer
    sent_bytes: list[int]
    """By peer."""
    received_bytes: list[int]


@dataclass(frozen=True)
class Route:
    """One stage as one rank sees it."""

    stage: Stage
    works: tuple[Work, ...]
    flops: StageFlops
    ins: Leg
    outs: Leg | None
    """None where nothing returns."""


KeyRun = tuple[int, HeadRun, int]
"""What works that read a prefix each of the same keys have in common: level, heads, first token."""


def key_run(work: Work) -> KeyRun:
    """See `KeyRun`; true of the works of one rank at levels from 1 up."""
    return work.level, work.run, work.keys[0][1].first


class Routes:
    """The stages of a rank in order, its local work, and where its tokens lie in its tensors."""

    def __init__(self, plan: AttentionPlan, rank: int, layer: int) -> None:
        self._plan = plan
        self._rank = rank
        self._layer = layer
        self._routes = tuple(self._route(stage) for stage in plan.stages())
        self.local = tuple(plan.local_work(rank, layer))
        runs = (plan.all_heads, *plan.halves())
        self.own_shards = {run: tuple(plan.own_shards(rank, run)) for run in runs}
        self.own_flops = {run: self._flops(partial(_own_shards, run)) for run in runs}
        self.local_flops = self._flops(lambda some, peer: some.local_work(peer, layer))
        self.longest = self._find_longest()
        """The work of each key run that has the most keys."""
        self._placed = tuple(self._place())
        self.num_rows = sum(len(span) for span in plan.spans(rank))

    def __iter__(self) -> Iterator[Route]:
        return iter(self._routes)

    def rows(self, sample: Sample) -> slice:
        """Own tokens as an index into this rank's tensors: a strided view, no copy."""
        for span, shift in self._placed:
            if span.begin <= sample.span.begin and sample.span.end <= span.end:
                return slice(sample.first + shift, sample.span.end + shift, sample.stride)
        raise ValueError(f"rank {self._rank} does not host {sample}")

    def _place(self) -> Iterator[tuple[Span, int]]:
        """The spans of tokens with what must be added to a token to get its row."""
        row = 0
        for span in self._plan.spans(self._rank):
            yield span, row - span.begin
            row += len(span)

    def _route(self, stage: Stage) -> Route:
        plan, rank, layer = self._plan, self._rank, self._layer
        peers, vector = range(plan.num_ranks), plan.head_dim * plan.element_bytes
        ins = _leg(
            tuple(tuple(plan.in_planes(rank, peer, layer, stage)) for peer in peers),
            tuple(tuple(plan.in_planes(peer, rank, layer, stage)) for peer in peers),
            vector,
        )
        outs = None
        if plan.returns(stage):
            outs = _leg(
                tuple(tuple(plan.out_planes(rank, peer, layer, stage)) for peer in peers),
                tuple(tuple(plan.out_planes(peer, rank, layer, stage)) for peer in peers),
                vector + LSE_BYTES,
            )
        flops = self._flops(lambda some, peer: some.works(peer, layer, stage))
        return Route(stage, tuple(plan.works(rank, layer, stage)), flops, ins, outs)

    def _flops(self, works_of: Callable[[AttentionPlan, int], Iterable[Work]]) -> StageFlops:
        """FLOPs of the busiest rank and of this one, which may be none of the plan's and idle.

        Who is busiest is counted by the heads of the first tensor rank: slices end where all of a mesh agree.
        """
        plan, counted = self._plan, self._plan.of_first_tensor_rank
        flops = [_flops(plan, works_of(counted, peer)) for peer in range(plan.num_ranks)]
        if self._rank >= plan.num_ranks:
            return max(flops), 0
        return max(flops), flops[self._rank] if counted is plan else _flops(plan, works_of(plan, self._rank))

    def _find_longest(self) -> dict[KeyRun, Work]:
        longest: dict[KeyRun, Work] = {}
        for work in (*self.local, *(work for route in self._routes for work in route.works)):
            if work.level:
                kept = longest.setdefault(key_run(work), work)
                longest[key_run(work)] = max(kept, work, key=lambda one: one.num_keys)
        return longest


def _flops(plan: AttentionPlan, works: Iterable[Work]) -> int:
    return 4 * plan.head_dim * sum(work.pairs for work in works)


def _own_shards(run: HeadRun, plan: AttentionPlan, rank: int) -> Iterator[Work]:
    return plan.own_shards(rank, run)


def _leg(sent: PlanesByPeer, received: PlanesByPeer, vector_bytes: int) -> Leg:
    sent_bytes, received_bytes = (
        [sum(plane.num_vectors for plane in planes) * vector_bytes for planes in peers]
        for peers in (sent, received)
    )
    return Leg(sent, received, sent_bytes, received_bytes)
