"""What goes from this source to one target: slabs in order, a credit per slot, resends, silence.

Belongs to the sender's thread. Knows nothing about how a link moves bytes or is opened.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace

from sps2.internal.v1.kv_transfer_service_pb2 import OpenRingResponse, SlabAck, SlabHeader, SlabVerdict
from sps2_engine.kv_transfer.base import Link, SlabBytes, TransferError
from sps2_engine.kv_transfer.relayout import cut
from sps2_engine.kv_transfer.slab import ArenaBytes, checksum
from sps2_engine.kv_transfer.transfer import Share, Slab, Transfer

logger = logging.getLogger(__name__)

MAX_RESENDS = 3


class Outbox:
    """The slabs of every transfer to one target process.

    Args:
        arena: Where slabs are read.
        source_incarnation: Goes into every header.
        address: Of the target, for messages.
        link: An open way to it.
        ring: What the target said about itself; a slot is a credit.
        sequences: Numbers the slabs to this target process, over all links to it.
        ack_timeout_s: How long the target may answer nothing while slabs wait for answers or credits.
    """

    def __init__(
        self,
        arena: ArenaBytes,
        source_incarnation: str,
        address: str,
        link: Link,
        ring: OpenRingResponse,
        sequences: Iterator[int],
        ack_timeout_s: float,
    ) -> None:
        self._arena = arena
        self._source_incarnation = source_incarnation
        self._address = address
        self._ring = ring
        self._sequences = sequences
        self._ack_timeout_s = ack_timeout_s
        self.link = link
        self._queue: deque[Slab] = deque()
        self._free_slots = list(range(ring.num_slots))
        self._unanswered: dict[int, Slab] = {}
        # Posted slabs by sequence, kept until the arena is not read for them any more.
        self._posted: dict[int, Slab] = {}
        self._last_progress = 0.0

    @property
    def target_incarnation(self) -> str:
        """The process at the other end."""
        return self._ring.target_incarnation

    @property
    def waiting(self) -> bool:
        """Whether slabs are queued or out, so that answers are to be looked for."""
        return bool(self._queue or self._unanswered or self._posted)

    def add(self, share: Share, now: float) -> None:
        """Queues a layer's share; a target of another life than the placement means fails the transfer."""
        expected = share.transfer.shard(share.part).fence.process_incarnation
        if expected != self.target_incarnation:
            message = f"{self._address} is process {self.target_incarnation}, the placement means {expected}"
            share.transfer.fail(TransferError("REFUSED", message))
            return
        if not self._is_silence_counted():
            self._last_progress = now
        try:
            slabs = cut(share.part, self._arena.head_bytes, self._ring.slot_bytes)
        except ValueError as error:
            share.transfer.fail(TransferError("REFUSED", f"{self._address}: {error}"))
            return
        self._queue.extend(Slab(share.transfer, part, share.layer) for part in slabs)

    def pump(self, now: float, count_bytes: Callable[[int], None]) -> int:
        """Takes answers and posts what credits allow; how many of both.

        Raises:
            LinkError: the target is gone.
        """
        acks = self.link.acks()
        self._drop_settled()
        for ack in acks:
            self._settle(ack)
        if acks:
            self._last_progress = now
        num_posted = 0
        while self._queue and self._free_slots:
            slab = self._queue.popleft()
            if slab.transfer.live:
                count_bytes(self._post(slab))
                num_posted += 1
        self._check_silence(now)
        return len(acks) + num_posted

    def _post(self, slab: Slab) -> int:
        transfer, part = slab.transfer, slab.part
        runs = transfer.runs(part)
        pieces = self._arena.pieces(slab.layer, runs, part.heads)
        slot = self._free_slots.pop()
        header = SlabHeader(
            fence=transfer.shard(part).fence,
            source_incarnation=self._source_incarnation,
            slot=slot,
            sequence=next(self._sequences),
            layer=slab.layer,
            token_begin=part.tokens.begin,
            token_end=part.tokens.end,
            head_begin=part.heads.begin,
            head_end=part.heads.end,
            num_bytes=part.num_cells * self._arena.head_bytes,
            crc32=checksum(pieces),
        )
        self._unanswered[header.sequence] = slab
        self._posted[header.sequence] = slab
        transfer.bytes_sent += header.num_bytes
        transfer.slabs_sent += 1
        self.link.post(header, SlabBytes(pieces, self._arena.addresses(slab.layer, runs, part.heads)))
        return header.num_bytes

    def _settle(self, ack: SlabAck) -> None:
        slab = self._unanswered.pop(ack.sequence, None)
        if slab is None:
            logger.warning("%s answers slab %d, which waits for no answer", self._address, ack.sequence)
            return
        self._free_slots.append(ack.slot)
        transfer = slab.transfer
        if not transfer.live:
            return
        if ack.verdict == SlabVerdict.SLAB_VERDICT_ACCEPTED:
            transfer.count_accepted(slab.part)
        elif ack.verdict == SlabVerdict.SLAB_VERDICT_CORRUPT:
            self._resend(slab)
        else:
            transfer.fail(TransferError("REFUSED", f"{self._address}: {ack.detail}"))

    def _resend(self, slab: Slab) -> None:
        tokens, heads = slab.part.tokens, slab.part.heads
        cells = f"tokens [{tokens.begin}, {tokens.end}), heads [{heads.begin}, {heads.end})"
        what = f"layer {slab.layer}, {cells} to {self._address}"
        if slab.num_resends >= MAX_RESENDS:
            message = f"{what}: the checksum failed {slab.num_resends + 1} times"
            slab.transfer.fail(TransferError("DATA_LOSS", message))
            return
        logger.warning("%s came corrupt, it is sent again", what)
        slab.transfer.slabs_resent += 1
        self._queue.appendleft(replace(slab, num_resends=slab.num_resends + 1))

    def _is_silence_counted(self) -> bool:
        slabs = (*self._queue, *self._unanswered.values())
        return any(slab.transfer.live for slab in slabs)

    def _check_silence(self, now: float) -> None:
        """A stopped target looks like this: its connections stand, its ring fills up, no answer comes."""
        if now - self._last_progress >= self._ack_timeout_s and self._is_silence_counted():
            message = f"{self._address} has answered nothing for {self._ack_timeout_s:g} s"
            self.fail(TransferError("PEER_TIMEOUT", message))

    def fail(self, error: TransferError) -> None:
        """Fails every transfer with a slab here; slabs that are out stay counted until they are settled."""
        for slab in (*self._queue, *self._unanswered.values()):
            slab.transfer.fail(error)
        self._queue.clear()

    def reads(self, transfer: Transfer) -> bool:
        """Whether a write that is under way may still read blocks of that transfer."""
        self._drop_settled()
        return any(slab.transfer is transfer for slab in self._posted.values())

    def settled(self) -> bool:
        """Whether nothing of this outbox reads the arena."""
        self._drop_settled()
        return not self._posted

    def _drop_settled(self) -> None:
        reading = self.link.reading()
        self._posted = {sequence: slab for sequence, slab in self._posted.items() if sequence in reading}
