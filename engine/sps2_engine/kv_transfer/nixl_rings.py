"""Staging rings in a target's memory, written by one-sided WRITE: one ring per source process.

No source is told of any memory but its own ring. A ring in doubt is kept, unread, until its source is known
to be gone: a stopped process that is continued still writes to the old address.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from google.protobuf.message import DecodeError

from sps2.internal.v1.kv_transfer_service_pb2 import (
    OpenRingRequest,
    OpenRingResponse,
    SlabAck,
    SlabHeader,
    SlabVerdict,
)
from sps2_engine.kv_transfer.base import LinkError, RingLimitError, RingOptions, Rings
from sps2_engine.kv_transfer.nixl import NixlAgent

logger = logging.getLogger(__name__)


@dataclass
class Ring:
    """The staging memory of one source process."""

    source_incarnation: str
    source_name: str
    peer: str
    """The source's agent name."""
    memory: torch.Tensor
    """[num_slots * slot_bytes], uint8."""
    registration: Any
    metadata: bytes
    """The target's agent metadata with this ring in it."""
    num_ties: int = 0
    """Open connections of the source's process."""
    superseded: bool = False
    """Another process has come under the source's name."""
    last_sequence: dict[int, int] = field(default_factory=dict)
    """By slot: a slot's slabs are numbered upwards, so a notification that comes twice is seen."""

    @property
    def trusted(self) -> bool:
        """Whether slabs are taken from it."""
        return self.num_ties > 0 and not self.superseded


class NixlRings(Rings):
    """See `Rings`."""

    def __init__(self, incarnation: str, options: RingOptions) -> None:
        self._agent = NixlAgent(f"kv-target-{incarnation}")
        self._incarnation = incarnation
        self._options = options
        self._rings: dict[str, Ring] = {}

    def open(self, request: OpenRingRequest) -> OpenRingResponse:
        """See `Rings`."""
        ring = self._rings.get(request.source_incarnation)
        if ring is None:
            self._supersede(request.source_name)
            ring = self._make(request)
        # Otherwise the same process comes again after its connection broke: it settled its writes before.
        return OpenRingResponse(
            agent_metadata=ring.metadata,
            target_incarnation=self._incarnation,
            base_address=ring.memory.data_ptr(),
            slot_bytes=self._options.slot_bytes,
            num_slots=self._options.num_slots,
        )

    def _supersede(self, source_name: str) -> None:
        for ring in self._rings.values():
            if ring.source_name == source_name and not ring.superseded:
                logger.info(
                    "the ring of %s, process %s, is quarantined", source_name, ring.source_incarnation
                )
                ring.superseded = True

    def _make(self, request: OpenRingRequest) -> Ring:
        if len(self._rings) >= self._options.max_rings:
            raise RingLimitError(f"{len(self._rings)} rings are open, the limit is {self._options.max_rings}")
        peer = self._agent.add_peer(request.agent_metadata)
        memory = torch.empty(self._options.num_slots * self._options.slot_bytes, dtype=torch.uint8)
        registration = self._agent.register(memory.data_ptr(), memory.nbytes)
        metadata = self._agent.metadata()
        ring = Ring(request.source_incarnation, request.source_name, peer, memory, registration, metadata)
        self._rings[ring.source_incarnation] = ring
        return ring

    def poll(self, take: Callable[[SlabHeader, str, Callable[[], memoryview]], SlabAck]) -> int:
        """See `Rings`."""
        self._agent.pump()
        num_slabs = 0
        for ring in list(self._rings.values()):
            for message in self._agent.take(ring.peer):
                num_slabs += 1
                self._answer(ring, self._take_slab(ring, message, take))
        return num_slabs

    def _take_slab(
        self,
        ring: Ring,
        message: bytes,
        take: Callable[[SlabHeader, str, Callable[[], memoryview]], SlabAck],
    ) -> SlabAck | None:
        try:
            header = SlabHeader.FromString(message)
        except DecodeError:
            logger.warning("%s sent a notification that is no SlabHeader", ring.source_name)
            return None
        fault = self._slot_fault(ring, header)
        if fault:
            return SlabAck(
                sequence=header.sequence,
                slot=header.slot,
                verdict=SlabVerdict.SLAB_VERDICT_REFUSED,
                detail=fault,
            )
        ring.last_sequence[header.slot] = header.sequence
        return take(header, ring.source_incarnation, lambda: self._copy(ring, header))

    def _slot_fault(self, ring: Ring, header: SlabHeader) -> str:
        if not ring.trusted:
            return "the ring is quarantined"
        if not 0 <= header.slot < self._options.num_slots:
            return f"slot {header.slot} of {self._options.num_slots}"
        if header.num_bytes > self._options.slot_bytes:
            return f"{header.num_bytes} bytes in a slot of {self._options.slot_bytes}"
        if header.sequence <= ring.last_sequence.get(header.slot, -1):
            return f"sequence {header.sequence} in slot {header.slot} is not new"
        return ""

    def _copy(self, ring: Ring, header: SlabHeader) -> memoryview:
        begin = header.slot * self._options.slot_bytes
        return memoryview(bytes(memoryview(ring.memory.numpy().data)[begin : begin + header.num_bytes]))

    def _answer(self, ring: Ring, ack: SlabAck | None) -> None:
        if ack is None:
            return
        try:
            self._agent.notify(ring.peer, ack.SerializeToString())
        except LinkError as error:
            logger.info("no answer to %s: %s", ring.source_name, error)

    def tie(self, source_incarnation: str) -> None:
        """See `Rings`."""
        ring = self._rings.get(source_incarnation)
        if ring is not None:
            ring.num_ties += 1

    def untie(self, source_incarnation: str) -> None:
        """See `Rings`."""
        ring = self._rings.get(source_incarnation)
        if ring is not None:
            ring.num_ties -= 1
            logger.info("a connection of %s ended, %d are left", ring.source_name, ring.num_ties)

    def sweep(self) -> None:
        """See `Rings`."""
        for ring in [ring for ring in self._rings.values() if not ring.trusted]:
            try:
                # An empty SlabAck, which sources ignore. It raises once UCX knows that the peer is gone.
                self._agent.notify(ring.peer, b"")
            except LinkError:
                logger.info("the ring of %s, process %s, is freed", ring.source_name, ring.source_incarnation)
                self._free(ring)

    def _free(self, ring: Ring) -> None:
        del self._rings[ring.source_incarnation]
        self._agent.remove_peer(ring.peer)
        self._agent.deregister(ring.registration)

    def close(self) -> None:
        """See `Rings`."""
        for ring in list(self._rings.values()):
            self._free(ring)

    @property
    def rings(self) -> list[Ring]:
        """The rings there are, for reports and tests."""
        return list(self._rings.values())
