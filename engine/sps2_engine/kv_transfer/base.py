"""The interfaces of KV transfer: who calls what, from which thread, how often.

Source side (prefill engine)
    The engine loop calls `KvSender.begin` once per attempt, `layer_ready` once per layer, `abort` at most
    once; each returns at once. One thread of the sender owns every `Link` and calls its methods: `post` once
    per slab, `acks` and `reading` each time it looks (every 0.2 to 1 ms while slabs are out, hardly ever when
    not).
Target side (decode engine)
    The engine loop calls `KvReceiver.expect` once per attempt before the placement leaves the rank, `forget`
    once when its blocks go. One thread of the receiver owns the `Rings` and calls `poll`; threads of the
    in-engine gRPC server call `SlabIntake.take` for slabs that come in a stream.

Nobody here knows about models, schedulers or process groups.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Final, Literal

from sps2.internal.v1.kv_transfer_service_pb2 import OpenRingRequest, OpenRingResponse, SlabAck, SlabHeader

TransportName = Literal["nixl", "grpc"]
TransportChoice = Literal["auto", "nixl", "grpc"]

Reason = Literal[
    "ABORTED",  # given up by this side
    "BAD_PLACEMENT",  # the placement does not take this rank's tokens
    "DATA_LOSS",  # a slab failed its checksum after every resend
    "FENCED",  # this rank's lease does not hold
    "FORMAT_MISMATCH",  # model, dtype or layout differ
    "INTERNAL",  # a bug: the sender's thread ended
    "PEER_TIMEOUT",  # the target answers nothing
    "PEER_UNREACHABLE",  # the target cannot be reached, or its connection broke
    "REFUSED",  # the target's fence does not hold, or the slab is not of the placement
    "TRANSPORT_UNAVAILABLE",  # NIXL was demanded and one side lacks it
]


class TransferError(Exception):
    """A transfer failed; other transfers of the process go on.

    Attributes:
        reason: UPPER_SNAKE, see `Reason`.
        message: For people; names the peer.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason: Reason = reason
        self.message = message


class LinkError(Exception):
    """The way to a peer is gone; everything on it has failed."""


@dataclass(frozen=True)
class SlabBytes:
    """Where a slab lies in the source's arena."""

    pieces: list[memoryview]
    """Views, in slab order."""
    addresses: list[tuple[int, int]]
    """(address, bytes) of the same."""


class Link(ABC):
    """A source's way to one target; made by the sender's thread and called by no other."""

    @abstractmethod
    def post(self, header: SlabHeader, slab: SlabBytes) -> None:
        """Starts a slab into `header.slot`; returns before it arrives.

        Raises:
            LinkError: the peer is gone.
        """

    @abstractmethod
    def acks(self) -> list[SlabAck]:
        """The answers that came since the last call.

        Raises:
            LinkError: the peer is gone; answers that came before are lost with it.
        """

    @abstractmethod
    def reading(self) -> Set[int]:
        """Sequences of slabs whose bytes in the arena may still be read. Never raises."""

    @abstractmethod
    def close(self) -> None:
        """Drops the connection; called once, when nothing is being read. Never raises."""

    polled: bool
    """Whether acks must be looked for; otherwise they wake the sender."""


class Rings(ABC):
    """The staging rings of a target, one per source process; called by the receiver's thread alone."""

    @abstractmethod
    def open(self, request: OpenRingRequest) -> OpenRingResponse:
        """The ring of that source process, made on its first call.

        Raises:
            RingLimitError: no memory for another ring.
        """

    @abstractmethod
    def poll(self, take: Callable[[SlabHeader, str, Callable[[], memoryview]], SlabAck]) -> int:
        """Hands every slab that has come to `take`, sends the answers, returns how many came.

        `take` gets the header, the incarnation of the source whose ring it lies in, and a function that
        copies the slab out of the ring.
        """

    @abstractmethod
    def tie(self, source_incarnation: str) -> None:
        """A connection of that process stands; slabs are taken from its ring while one does."""

    @abstractmethod
    def untie(self, source_incarnation: str) -> None:
        """A connection of that process ended; without any its ring is quarantined: kept, but not read."""

    @abstractmethod
    def sweep(self) -> None:
        """Frees quarantined rings whose source is known to be gone; called about once a second."""

    @abstractmethod
    def close(self) -> None:
        """Frees everything."""


class RingLimitError(Exception):
    """The target holds as many rings as it may."""


MAX_SLOT_BYTES: Final = 16 << 20


@dataclass(frozen=True)
class RingOptions:
    """Staging memory of a target; `num_slots * slot_bytes` per source process, 8 MiB by default."""

    slot_bytes: int = 1 << 20
    """Bytes of a slab at most. Measured on two cores: 64 KiB 0.5 GB/s, 256 KiB 1.7, 1 MiB 2.6."""
    num_slots: int = 8
    """Slabs that a source may have under way."""
    max_rings: int = 64
    """Source processes at once, quarantined ones included."""

    def __post_init__(self) -> None:
        if min(self.slot_bytes, self.num_slots, self.max_rings) < 1:
            raise ValueError(f"ring options must be positive: {self}")
        if self.slot_bytes > MAX_SLOT_BYTES:
            raise ValueError(f"slots of {self.slot_bytes} bytes, at most {MAX_SLOT_BYTES} fit into a message")
