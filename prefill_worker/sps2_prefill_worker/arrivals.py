"""Cached KV of another prefill group on its way to this rank: blocks that wait for it, kept once it is complete.

Obeys the leader as all else does, but at once: a rank that computes a long prompt takes KV meanwhile. So it never waits
for room. A run that is evicted before it is complete is given up: no byte goes to its blocks any more.
"""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sps2.internal.v1 import engine_pb2, placement_pb2
from sps2_engine.kv_pool import OutOfBlocksError
from sps2_engine.kv_transfer.receiver import KvReceiver
from sps2_engine.kv_transfer.rows import Rows
from sps2_layout.layout import Span
from sps2_prefill_worker.publish import Publisher

Report = Callable[[engine_pb2.EngineEvent], None]


@dataclass(frozen=True)
class Arrival:
    """A part of a run that is not complete."""

    attempt: placement_pb2.Attempt
    fence: placement_pb2.Fence
    rows: Rows


class Arrivals:
    """Runs that other groups send. Called by the link's thread; told of ends by the receiver's.

    Args:
        publisher: owns all blocks.
        receiver: takes slabs.
        process_incarnation: of this engine.
        report: tells the leader.
    """

    def __init__(
        self, publisher: Publisher, receiver: KvReceiver, process_incarnation: str, report: Report
    ) -> None:
        self._publisher = publisher
        self._receiver = receiver
        self._incarnation = process_incarnation
        self._report = report
        self._arrivals: dict[int, Arrival] = {}
        # Held from a run's end here to its beginning among what is kept, so that no eviction falls between.
        self._lock = threading.Lock()

    def expect(self, fetch: engine_pb2.FetchPrefix, epoch: int) -> None:
        """Takes room for a part of a run and lets its slabs in; says so, or that there is no room."""
        span = Span(fetch.span.begin, fetch.span.end)
        fence = placement_pb2.Fence(process_incarnation=self._incarnation, epoch=epoch, attempt=fetch.attempt)
        self.drop(fetch.evict)
        self._publisher.evict(fetch.evict)
        try:
            rows = self._publisher.take([span] if span else [])
        except OutOfBlocksError as error:
            refused = engine_pb2.PrefixRefused(run=fetch.run, reason=str(error))
            self._tell(engine_pb2.PrefillReport(attempt=fetch.attempt, prefix_refused=refused))
            return
        with self._lock:
            self._arrivals[fetch.run] = Arrival(fetch.attempt, fence, rows)
            run = fetch.run
            self._receiver.expect(fence, span.begin, span.end, rows.blocks, lambda: self._complete(run))
        expected = engine_pb2.PrefixExpected(
            run=fetch.run,
            transfer_address=self._receiver.address,
            process_incarnation=self._incarnation,
        )
        self._tell(engine_pb2.PrefillReport(attempt=fetch.attempt, prefix_expected=expected))

    def drop(self, runs: Iterable[int]) -> None:
        """Gives up those of these runs that are not complete, and frees their blocks."""
        with self._lock:
            for run in runs:
                arrival = self._arrivals.pop(run, None)
                if arrival is not None:
                    self._receiver.forget(arrival.fence)
                    self._publisher.give_back(arrival.rows)

    def drop_all(self) -> None:
        """The epoch is over."""
        self.drop(list(self._arrivals))

    def close(self) -> None:
        """Takes nothing any more; sources see their connections end."""
        self._receiver.close()

    def _complete(self, run: int) -> None:
        with self._lock:
            arrival = self._arrivals.pop(run, None)
            if arrival is None:
                return
            self._receiver.forget(arrival.fence)
            self._publisher.keep(run, arrival.rows)
        fetched = engine_pb2.PrefixFetched(run=run)
        self._tell(engine_pb2.PrefillReport(attempt=arrival.attempt, prefix_fetched=fetched))

    def _tell(self, report: engine_pb2.PrefillReport) -> None:
        self._report(engine_pb2.EngineEvent(prefill=report))
