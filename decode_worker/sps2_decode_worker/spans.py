"""Spans of decode ranks, made when an attempt ends. While it decodes, each report of a step costs two additions."""

import asyncio
from dataclasses import dataclass

from sps2_decode_worker.attempts import LiveAttempt
from sps2_engine.mesh import Mesh
from sps2_service import span_names as names
from sps2_service.trace_context import Place
from sps2_service.tracing import Span, Tracing, UnixClock


@dataclass(frozen=True)
class Steps:
    """What a rank has computed: of all attempts, since the leader began."""

    count: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Begun:
    """An attempt whose ranks have begun to decode."""

    at: float
    """By the event loop's clock."""
    steps: dict[int, Steps]
    """Of each rank until then."""


class DecodeSpans:
    """A span for each rank of each attempt that decodes, beneath the router's; without tracing nothing."""

    def __init__(self, tracing: Tracing | None) -> None:
        self._tracing = tracing
        self._steps: dict[int, Steps] = {}
        self._begun: dict[LiveAttempt, tuple[Place, Begun]] = {}

    def step(self, rank: int, step_s: float) -> None:
        """A rank has computed a step."""
        if self._tracing is not None:
            before = self._steps.get(rank, Steps())
            self._steps[rank] = Steps(before.count + 1, before.seconds + step_s)

    def begin(self, live: LiveAttempt) -> None:
        """Its rows are let in."""
        if self._tracing is not None and live.place is not None:
            begun = Begun(asyncio.get_running_loop().time(), dict(self._steps))
            self._begun[live] = live.place, begun

    def end(self, live: LiveAttempt, mesh: Mesh) -> None:
        """It is over, whether it has begun or not; the ranks are those that hold its KV now."""
        place, begun = self._begun.pop(live, (None, None))
        if self._tracing is None or place is None or begun is None:
            return
        clock = UnixClock(asyncio.get_running_loop().time())
        spread = live.row.tenant.spread
        homes = set(mesh.ranks_at(spread.home))
        holders = {rank for holder in spread.holders for rank in mesh.ranks_at(holder)}
        for rank in sorted(holders | homes):
            before, now = begun.steps.get(rank, Steps()), self._steps.get(rank, Steps())
            self._tracing.take(
                Span(
                    f"{names.DECODE_RANK} {rank}",
                    self._tracing.beneath(place),
                    place,
                    clock.ns(begun.at),
                    clock.ns(max(begun.at, live.pace.last_at)),
                    {
                        names.REQUEST_ID: live.request.attempt.request_id,
                        names.ATTEMPT: live.request.attempt.number,
                        names.GROUP: live.reserve.placement.group,
                        names.RANK: rank,
                        names.IS_HOME: rank in homes,
                        names.NUM_STEPS: now.count - before.count,
                        names.STEP_SECONDS: now.seconds - before.seconds,
                    },
                    error=live.error.reason if live.error else "",
                )
            )
