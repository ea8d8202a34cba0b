"""KV of prompts on its way from this prefill rank to the decode ranks: blocks, transfers, and what became of them.

Knows nothing of models or ranks: it is told when a layer's KV lies in its blocks.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sps2.internal.v1 import engine_pb2, placement_pb2, prefill_service_pb2
from sps2_engine.kv_pool import BLOCK_TOKENS, BlockPool, OutOfBlocksError
from sps2_engine.kv_transfer.base import TransferError
from sps2_engine.kv_transfer.sender import KvSender
from sps2_engine.kv_transfer.transfer import Transfer
from sps2_layout.layout import Span

_log = logging.getLogger(__name__)

ROOM_TIMEOUT_S = 60.0
"""Longest wait for earlier prompts' KV to be delivered when the arena is full."""

AttemptKey = tuple[str, int]
Report = Callable[[engine_pb2.EngineEvent], None]


def attempt_key(attempt: placement_pb2.Attempt) -> AttemptKey:
    """The attempt as a dictionary key."""
    return attempt.request_id, attempt.number


@dataclass
class Delivery:
    """KV of one attempt's slice; over when it is both computed and sent, or given up."""

    attempt: placement_pb2.Attempt
    blocks: list[int]
    transfer: Transfer | None
    """None where the slice is empty."""
    bytes_sent: int | None = None
    """Known once every slab is accepted."""
    collective_bytes: int | None = None
    """Known once the prompt is computed."""
    exposed_s: float = 0.0


class Publisher:
    """Owns the blocks of all undelivered KV. Called by the compute thread; told of ends by the sender's thread."""

    def __init__(
        self, pool: BlockPool, sender: KvSender, bytes_posted: Counter[str], name: str, report: Report
    ) -> None:
        self._pool = pool
        self._sender = sender
        self._bytes_posted = bytes_posted
        self._name = name
        self._report = report
        self._deliveries: dict[AttemptKey, Delivery] = {}
        self._changed = threading.Condition()  # its lock is reentrant

    @property
    def blocks_used(self) -> int:
        """Blocks that hold KV which is not delivered yet."""
        return self._pool.num_used

    def begin(
        self, attempt: placement_pb2.Attempt, placement: placement_pb2.Placement, spans: Sequence[Span]
    ) -> Delivery:
        """Takes blocks for tokens and opens their transfer, waiting where earlier KV fills the arena.

        Args:
            attempt: Whose they are.
            placement: Where they go.
            spans: In order and disjoint; the delivery's blocks hold their tokens one after another.

        Raises:
            OutOfBlocksError: no room within `ROOM_TIMEOUT_S`.
        """
        num_tokens = sum(map(len, spans))
        blocks = self._wait_for_blocks(-(-num_tokens // BLOCK_TOKENS))
        key = attempt_key(attempt)
        transfer = self._sender.begin(attempt, placement, spans, blocks) if num_tokens else None
        delivery = Delivery(attempt, blocks, transfer, bytes_sent=None if transfer else 0)
        with self._changed:
            self._deliveries[key] = delivery
        if transfer is not None:
            transfer.done.add_done_callback(lambda _done: self._on_transfer_done(key, transfer))
        return delivery

    def layer_ready(self, delivery: Delivery, layer: int) -> None:
        """The slice's keys and values of `layer` lie in the arena; returns at once."""
        if delivery.transfer is not None:
            self._sender.layer_ready(delivery.transfer, layer)

    def computed(self, delivery: Delivery, collective_bytes: int, exposed_s: float) -> None:
        """The prompt is computed: what is left is to deliver it."""
        with self._changed:
            delivery.collective_bytes, delivery.exposed_s = collective_bytes, exposed_s
            self._finish_if_over(delivery)

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

    def give_up_all(self) -> None:
        """`give_up` for every attempt."""
        for key in list(self._deliveries):
            self.give_up(key)

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
            failed = engine_pb2.AttemptFailed(
                attempt=delivery.attempt, reason=error.reason, message=f"{self._name}: {error}"
            )
            self._report(engine_pb2.EngineEvent(attempt_failed=failed))

    def _finish_if_over(self, delivery: Delivery) -> None:
        if delivery.bytes_sent is None or delivery.collective_bytes is None:
            return
        del self._deliveries[attempt_key(delivery.attempt)]
        self._free(delivery.blocks)
        delivered = prefill_service_pb2.PrefillDelivered(
            collective_bytes=delivery.collective_bytes,
            kv_transfer_bytes=delivery.bytes_sent,
            exposed_s=delivery.exposed_s,
        )
        report = engine_pb2.PrefillReport(attempt=delivery.attempt, delivered=delivered)
        self._report(engine_pb2.EngineEvent(prefill=report))

    def _free_given_up(self, delivery: Delivery) -> None:
        self._free(delivery.blocks)
        _log.info("%s given up: %d KV blocks in use", delivery.attempt.request_id, self.blocks_used)

    def _free(self, blocks: list[int]) -> None:
        with self._changed:
            self._pool.free(blocks)
            self._changed.notify_all()
