"""CSA on one rank: what the plan of any exchange schedule says, done in three phases that overlap.

    pack -> post in of every stage                        asynchronous
    own-shard attention, first half of the heads          hides the inbound exchanges
    for each stage: wait in; attention; post out          hides the earlier outbound ones
    own-shard attention, second half; local work          hides the last outbound one
    wait outs; merge

What is computed and what travels is the plan's. Side streams on a GPU are NCCL's own: an exchange waits for
what was launched before its post, and a wait holds up the compute launched after it, not the host.

Compute between two of these steps is a stage of the slicer: at the ends of slices all ranks agree whether to go
on, beside the exchanges that are under way, and equally often on every rank because the plan is the same.
"""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from sps2_engine.attention.csa_step import LayerStep
from sps2_engine.attention.pieces import HeadRun
from sps2_engine.attention.plan import AttentionPlan
from sps2_engine.attention.routes import Leg, Routes
from sps2_engine.attention.sliced import SegmentAttention, State
from sps2_engine.attention.trace import Event, Kind, Trace
from sps2_engine.collectives import Communicator, PendingExchange
from sps2_engine.slices import Slicer
from sps2_kernels.segment_attention import segment_attention

KIND = "all_to_all"
"""Name of the byte counter."""
IN_LANE, OUT_LANE = 0, 1


@dataclass
class _Posted:
    """An exchange under way."""

    pending: PendingExchange
    name: str
    layer: int
    begin_s: float
    """When it was posted, on the clock of `time.perf_counter`."""
    complete_s: float = math.inf
    """When it was complete, once that is known."""
    received: Tensor | None = None
    """What came, once it has been waited for."""

    def note(self, at_s: float) -> None:
        """It was complete at that time."""
        self.complete_s = at_s


class CsaSchedule:
    """Attention of one prompt on one rank; made once for a prompt and called for each layer in turn.

    Args:
        plan: the same on every rank.
        communicator: the plan's ranks.
        scale: factor on the scores.
        slicer: the group agrees at the ends of its slices whether to go on; without one it never asks.
        pipelined: False waits for every exchange at its post, for comparison.
        trace: takes the events; without one nothing is recorded.
        attention: the kernel's form.
    """

    def __init__(
        self,
        plan: AttentionPlan,
        communicator: Communicator,
        scale: float,
        slicer: Slicer | None = None,
        *,
        pipelined: bool = True,
        trace: Trace | None = None,
        attention: SegmentAttention = segment_attention,
    ) -> None:
        self._plan = plan
        self._communicator = communicator
        self._scale = scale
        self._slicer = slicer or Slicer.endless()
        self._pipelined = pipelined
        self._trace = trace
        self._attention = attention
        self._routes: dict[int, Routes] = {}
        """What travels and what is computed, by phase of the layer."""
        self.exposed_s = 0.0
        """Seconds spent waiting for exchanges with nothing left to compute."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of this rank's tokens over all that they see.

        Args:
            layer: index of the layer (what a level samples depends on it).
            q: [own tokens, q_heads, head_dim], rotated; tokens as `AttentionPlan.spans` has them.
            k: [own tokens, kv_heads, head_dim], rotated.
            v: [own tokens, kv_heads, head_dim].

        Returns:
            o [own tokens, q_heads, head_dim].

        Raises:
            GroupError: an exchange failed.
        """
        return self.state(layer, q, k, v)[0]

    def state(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> State:
        """Like `attend`, with the log-sum-exp [own tokens, q_heads] fp32, for whoever merges more into it."""
        routes = self._routes_of(layer)
        piece_flops, rank = self._slicer.slice_flops, self._communicator.rank
        step = LayerStep(self._plan, routes, rank, (q, k, v), self._scale, piece_flops, self._attention)
        ins = [
            self._post(f"in {route.stage}", layer, step.pack_in(route), route.ins, IN_LANE)
            for route in routes
        ]
        outs: list[tuple[Leg, _Posted]] = []
        first, *others = self._plan.halves() if ins else [self._plan.all_heads]
        self._own_shards(step, first, layer)
        for route, posted in zip(routes, ins, strict=True):
            step.take_in(route, self._wait(posted))
            with (
                self._span("compute", f"across {route.stage}", layer),
                self._slicer.stage(*route.flops) as stage,
            ):
                step.across(route, stage)
            if route.outs:
                packed = step.pack_out(route.outs)
                outs.append(
                    (route.outs, self._post(f"out {route.stage}", layer, packed, route.outs, OUT_LANE))
                )
        for run in others:
            self._own_shards(step, run, layer)
        with self._span("compute", "local", layer), self._slicer.stage(*routes.local_flops) as stage:
            step.local(stage)
        for leg, posted in outs:
            step.take_out(leg, self._wait(posted))
        return step.o, step.lse

    def _routes_of(self, layer: int) -> Routes:
        phase = self._plan.phase(layer)
        if phase not in self._routes:
            self._routes[phase] = Routes(self._plan, self._communicator.rank, layer)
        return self._routes[phase]

    def _own_shards(self, step: LayerStep, run: HeadRun, layer: int) -> None:
        flops = self._routes_of(layer).own_flops[run]
        name = f"own heads {run.q_heads.begin}-{run.q_heads.end}"
        with self._span("compute", name, layer), self._slicer.stage(*flops) as stage:
            step.own_shards(run, stage)

    def _post(self, name: str, layer: int, packed: Tensor, leg: Leg, lane: int) -> _Posted:
        begin_s = time.perf_counter()
        with self._span("post", name, layer):
            pending = self._communicator.all_to_all(packed, leg.sent_bytes, leg.received_bytes, KIND, lane)
        posted = _Posted(pending, name, layer, begin_s)
        if self._trace:
            pending.when_complete(posted.note)
        if not self._pipelined:
            self._wait(posted)
        return posted

    def _wait(self, posted: _Posted) -> Tensor:
        if posted.received is None:
            started = time.perf_counter()
            with self._span("wait", posted.name, posted.layer):
                posted.received = posted.pending.wait()
            ended = time.perf_counter()
            self.exposed_s += ended - started
            if self._trace:
                # Its completion may be reported just after a wait that was for nothing else.
                end_s = min(posted.complete_s, ended)
                self._trace.events.append(Event("flight", posted.name, posted.layer, posted.begin_s, end_s))
        return posted.received

    def _span(self, kind: Kind, name: str, layer: int) -> AbstractContextManager[None]:
        return self._trace.span(kind, name, layer) if self._trace else nullcontext()
