"""KV of prompts on its way from this prefill rank to the decode ranks: blocks, transfers, and what became of them.

What the leader wants kept for later prompts is not freed but handed to `KeptRuns`.

Knows nothing of models or ranks: it is told when a layer's KV lies in its blocks.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from sps2.internal.v1 import engine_pb2, placement_pb2, prefill_service_pb2
from sps2_engine.kv_pool import BLOCK_TOKENS, BlockPool, OutOfBlocksError
from sps2_engine.kv_transfer.base import TransferError
from sps2_engine.kv_transfer.rows import Rows, UsedRows
from sps2_engine.kv_transfer.sender import KvSender
from sps2_engine.kv_transfer.transfer import Transfer
from sps2_layout.layout import Span
from sps2_layout.placement import num_held
from sps2_prefill_worker.kept_runs import KeptRuns

_log = logging.getLogger(__name__)

ROOM_TIMEOUT_S = 60.0
"""Longest wait for earlier prompts' KV to be delivered when the arena is full."""

AttemptKey = tuple[str, int]
Report = Callable[[engine_pb2.EngineEvent], None]


def attempt_key(attempt: placement_pb2.Attempt) -> AttemptKey:
    """The attempt as a dictionary key."""
    return attempt.request_id, attempt.number


def request_fields(attempt: placement_pb2.Attempt) -> dict[str, object]:
    """What a log line about an attempt carries."""
    return {"request_id": attempt.request_id, "attempt": attempt.number}


def _unix_us() -> int:
    return time.time_ns() // 1000


@dataclass
class Delivery:
    """KV of one attempt's slice; over when it is both computed and sent, or given up."""

    attempt: placement_pb2.Attempt
    rows: Rows
    """What is computed here."""
    cached: Sequence[UsedRows]
    """What is cached here of the beginning."""
    transfer: Transfer | None
    """None where nothing is to be sent."""
    keep: engine_pb2.KeptPrefix | None
    """What stays when it is delivered."""
    bytes_sent: int | None = None
    """Known once every slab is accepted."""
    collective_bytes: int | None = None
    """Known once the prompt is computed."""
    exposed_s: float = 0.0
    times: engine_pb2.ComputeTimes = field(
        default_factory=lambda: engine_pb2.ComputeTimes(begun_at_us=_unix_us())
    )


class Publisher:
    """Owns the blocks of all undelivered KV, and what is kept of it.

    Called by the compute thread, and by the link's for what other groups send and get; told of ends by the sender's.
    """

    def __init__(
        self, pool: BlockPool, sender: KvSender, bytes_posted: Counter[str], name: str, report: Report
    ) -> None:
        self._pool = pool
        self._sender = sender
        self._bytes_posted = bytes_posted
        self._name = name
        self._report = report
        self._deliveries: dict[AttemptKey, Delivery] = {}
        self._kept = KeptRuns(pool)
        self._changed = threading.Condition()  # its lock is reentrant

    @property
    def blocks_used(self) -> int:
        """Blocks that hold KV which is not delivered yet."""
        with self._changed:
            return self._pool.num_used - self._kept.num_blocks

    @property
    def blocks_cached(self) -> int:
        """Blocks that hold nothing but cached KV."""
        with self._changed:
            return self._kept.num_blocks

    def begin(self, run: engine_pb2.RunPrefill, spans: Sequence[Span]) -> Delivery:
        """Takes blocks for tokens and opens their transfer, waiting where earlier KV fills the arena.

        With them goes what is cached here of the text's beginning. What its targets hold already is not sent.

        Args:
            run: The attempt, where its KV goes, what is cached of it and what is kept.
            spans: Tokens that are computed here, in order and disjoint.

        Raises:
            OutOfBlocksError: no room within `ROOM_TIMEOUT_S`.
            ValueError: what the leader takes for cached is not.
        """
        self.evict(run.evict)
        with self._changed:
            cached = self._kept.find(run.cached.parts)
            for one in cached:
                self._pool.share(one.rows.blocks)
        try:
            rows = Rows(spans, self._wait_for_blocks(-(-sum(map(len, spans)) // BLOCK_TOKENS)))
        except OutOfBlocksError:
            self._free([one.rows for one in cached])
            raise
        held, key = num_held(run.placement), attempt_key(run.attempt)
        sent = [span.cut(held, span.end) for span in (*(s for one in cached for s in one.spans), *spans)]
        sent = [span for span in sent if len(span)]
        sources = [*cached, UsedRows.of_all(rows)]
        transfer = self._sender.begin(run.attempt, run.placement, sent, sources) if sent else None
        keep = run.keep if run.HasField("keep") else None
        delivery = Delivery(run.attempt, rows, cached, transfer, keep, bytes_sent=None if transfer else 0)
        with self._changed:
            self._deliveries[key] = delivery
        if transfer is not None:
            transfer.done.add_done_callback(lambda _done: self._on_transfer_done(key, transfer))
        return delivery

    def send_cached(self, send: engine_pb2.SendCached, num_layers: int) -> None:
        """Sends KV that is cached here to another group: as of an attempt that computes nothing."""
        run = engine_pb2.RunPrefill(attempt=send.attempt, placement=send.placement, cached=send.cached)
        try:
            delivery = self.begin(run, [])
        except ValueError as error:
            self._report_failure(send.attempt, "PREFIX_NOT_CACHED", str(error))
            return
        for layer in range(num_layers):
            self.layer_ready(delivery, layer)
        self.computed(delivery, 0, 0.0)

    def take(self, spans: Sequence[Span]) -> Rows:
        """Blocks for tokens that another group sends; never waits.

        Raises:
            OutOfBlocksError: there is no room now.
        """
        with self._changed:
            return Rows(spans, self._pool.allocate(-(-sum(map(len, spans)) // BLOCK_TOKENS)))

    def keep(self, number: int, rows: Rows) -> None:
        """Caches what another group has sent as a run."""
        with self._changed:
            self._kept.keep(number, rows, rows.spans[-1].end if rows.spans else 0)

    def give_back(self, rows: Rows) -> None:
        """Frees what was taken in vain."""
        self._free([rows])

    def layer_ready(self, delivery: Delivery, layer: int) -> None:
        """The slice's keys and values of `layer` lie in the arena; returns at once."""
        if delivery.transfer is not None:
            self._sender.layer_ready(delivery.transfer, layer)

    def computed(self, delivery: Delivery, collective_bytes: int, exposed_s: float) -> None:
        """The prompt is computed: what is left is to deliver it."""
        with self._changed:
            delivery.collective_bytes, delivery.exposed_s = collective_bytes, exposed_s
            delivery.times.computed_at_us = _unix_us()
            self._finish_if_over(delivery)

    def evict(self, numbers: Iterable[int]) -> None:
        """Frees what is cached of these runs, or will not keep them when they are delivered."""
        with self._changed:
            for number in numbers:
                if not self._kept.evict(number):
                    for delivery in self._deliveries.values():
                        if delivery.keep is not None and delivery.keep.run == number:
                            delivery.keep = None
            self._changed.notify_all()

    def give_up(self, key: AttemptKey) -> None:
        """Stops an attempt's transfer and frees its blocks; one that is unknown is free already."""
        with self._changed:
            delivery = self._deliveries.pop(key, None)
        if delivery is None:
            return
        if delivery.transfer is None:
            self._free_given_up(delivery)
        else:
            # A write that is under way still reads the blocks, and cannot be called back.
            quiet = self._sender.abort(delivery.transfer)
            quiet.add_done_callback(lambda _quiet: self._free_given_up(delivery))

    def give_up_computed(self, key: AttemptKey) -> None:
        """`give_up` for an attempt that only its transfer keeps; another thread may wait for its blocks."""
        with self._changed:
            delivery = self._deliveries.get(key)
            if delivery is not None and delivery.collective_bytes is not None:
                self.give_up(key)

    def give_up_all(self) -> None:
        """`give_up` for every attempt, and for what is cached."""
        for key in list(self._deliveries):
            self.give_up(key)
        with self._changed:
            self._kept.clear()

    def _wait_for_blocks(self, num_blocks: int) -> list[int]:
        deadline = time.monotonic() + ROOM_TIMEOUT_S
        with self._changed:
            while True:
                try:
                    return self._pool.allocate(num_blocks)
                except OutOfBlocksError:
                    if not self._changed.wait(deadline - time.monotonic()):
                        raise

    def _on_transfer_done(self, key: AttemptKey, transfer: Transfer) -> None:
        try:
            summary = transfer.done.result(timeout=0)
        except TransferError as error:
            self._on_transfer_failed(key, error)
            return
        with self._changed:
            self._bytes_posted["kv_transfer"] += summary.bytes_sent
            delivery = self._deliveries.get(key)
            if delivery is not None:
                delivery.bytes_sent = summary.bytes_sent
                self._finish_if_over(delivery)

    def _on_transfer_failed(self, key: AttemptKey, error: TransferError) -> None:
        with self._changed:
            delivery = self._deliveries.get(key)
        if delivery is not None:  # else it was given up here, and the error says no more than that
            self._report_failure(delivery.attempt, error.reason, str(error))

    def _report_failure(self, attempt: placement_pb2.Attempt, reason: str, message: str) -> None:
        failed = engine_pb2.AttemptFailed(attempt=attempt, reason=reason, message=f"{self._name}: {message}")
        self._report(engine_pb2.EngineEvent(attempt_failed=failed))

    def _finish_if_over(self, delivery: Delivery) -> None:
        if delivery.bytes_sent is None or delivery.collective_bytes is None:
            return
        del self._deliveries[attempt_key(delivery.attempt)]
        self._free([one.rows for one in delivery.cached])
        if delivery.keep is None:
            self._free([delivery.rows])
        else:
            self._kept.keep(delivery.keep.run, delivery.rows, delivery.keep.token_end)
        delivered = prefill_service_pb2.PrefillDelivered(
            collective_bytes=delivery.collective_bytes,
            kv_transfer_bytes=delivery.bytes_sent,
            exposed_s=delivery.exposed_s,
        )
        delivery.times.delivered_at_us = _unix_us()
        report = engine_pb2.PrefillReport(attempt=delivery.attempt, delivered=delivered, times=delivery.times)
        self._report(engine_pb2.EngineEvent(prefill=report))

    def _free_given_up(self, delivery: Delivery) -> None:
        self._free([delivery.rows, *(one.rows for one in delivery.cached)])
        _log.info("given up: %d KV blocks in use", self.blocks_used, extra=request_fields(delivery.attempt))

    def _free(self, rows: Iterable[Rows]) -> None:
        with self._changed:
            for one in rows:
                self._pool.free(one.blocks)
            self._changed.notify_all()
