"""The source's half of KvTransferService: the handshake, and the stream that ties it to a target.

The stream is open under either transport. It carries the slabs where NIXL is absent; and its end tells each
side at once that the other's process is gone, which one-sided writes do not. Knows nothing about credits or
attempts. The target's half is `grpc_server.py`.
"""

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Final

import grpc

from sps2.internal.v1.kv_transfer_service_pb2 import (
    OpenRingRequest,
    OpenRingResponse,
    PushSlabsRequest,
    SlabAck,
    SlabHeader,
)
from sps2.internal.v1.kv_transfer_service_pb2_grpc import KvTransferServiceStub
from sps2_engine.kv_transfer.base import Link, LinkError, SlabBytes, TransferError

logger = logging.getLogger(__name__)

SOURCE_METADATA_KEY: Final = "sps2-source-incarnation"
MAX_MESSAGE_BYTES: Final = 32 << 20
CHANNEL_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A cut wire shows only by silence.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # Each source has its own connection, so that its end says something about that source.
    ("grpc.use_local_subchannel_pool", 1),
)


class SlabStream:
    """One PushSlabs call. Any thread may call it; its own thread waits for answers and calls `on_event`."""

    def __init__(
        self, stub: KvTransferServiceStub, source_incarnation: str, on_event: Callable[[], None]
    ) -> None:
        self._requests: SimpleQueue[PushSlabsRequest | None] = SimpleQueue()
        self._acks: deque[SlabAck] = deque()
        self._on_event = on_event
        self._end = ""
        self._accepted = False
        self._call = stub.PushSlabs(
            iter(self._requests.get, None), metadata=((SOURCE_METADATA_KEY, source_incarnation),)
        )
        self._reader = threading.Thread(target=self._read, name="kv-acks", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            self._call.initial_metadata()
            self._accepted = self._call.is_active()
            self._on_event()
            for response in self._call:
                self._acks.append(response.ack)
                self._on_event()
            self._end = "the target ended the stream"
        except grpc.RpcError as error:
            self._end = describe(error)
        self._on_event()

    @property
    def accepted(self) -> bool:
        """Whether the target has taken the stream on."""
        return self._accepted

    def check(self) -> None:
        """Raises LinkError when the stream has ended."""
        if self._end:
            raise LinkError(self._end)

    def send(self, header: SlabHeader, payload: bytes) -> None:
        """Queues one slab."""
        self._requests.put(PushSlabsRequest(header=header, payload=payload))

    def take_acks(self) -> list[SlabAck]:
        """The answers since the last call."""
        acks = []
        with contextlib.suppress(IndexError):  # empty: all taken
            while True:
                acks.append(self._acks.popleft())
        return acks

    def close(self) -> None:
        """Ends the stream and its thread."""
        self._requests.put(None)
        self._call.cancel()  # type: ignore[no-untyped-call]
        self._reader.join(2)


class GrpcLink(Link):
    """Slabs in the stream; each is copied out of the arena when it is posted."""

    polled = False

    def __init__(self, stream: SlabStream) -> None:
        self._stream = stream

    def post(self, header: SlabHeader, slab: SlabBytes) -> None:
        """See `Link`."""
        self._stream.check()
        self._stream.send(header, b"".join(slab.pieces))

    def acks(self) -> list[SlabAck]:
        """See `Link`."""
        self._stream.check()
        return self._stream.take_acks()

    def reading(self) -> set[int]:
        """See `Link`."""
        return set()

    def close(self) -> None:
        """The stream belongs to the `Handshake`, which ends it."""


class Handshake:
    """A channel to one target's engine, and the two calls that open it; nothing here blocks."""

    def __init__(
        self, address: str, request: OpenRingRequest, timeout_s: float, on_event: Callable[[], None]
    ) -> None:
        self._address = address
        self._on_event = on_event
        self._source_incarnation = request.source_incarnation
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = KvTransferServiceStub(self._channel)
        self._stream: SlabStream | None = None
        self._ring: OpenRingResponse | None = None
        # Its deadline bounds the wait: a dead address fails at once, a silent one after `timeout_s`.
        self._opening = self._stub.OpenRing.future(request, timeout=timeout_s)
        self._opening.add_done_callback(lambda _: on_event())

    def result(self) -> tuple[OpenRingResponse, SlabStream] | None:
        """The target's answer and the stream to it, once both are there.

        Raises:
            LinkError: the target cannot be reached.
            TransferError: it does not take this format.
        """
        if self._ring is None:
            if not self._opening.done():
                return None
            self._ring = self._answer()
            self._stream = SlabStream(self._stub, self._source_incarnation, self._on_event)
        assert self._stream is not None
        self._stream.check()
        return (self._ring, self._stream) if self._stream.accepted else None

    def _answer(self) -> OpenRingResponse:
        try:
            return self._opening.result(timeout=0)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.FAILED_PRECONDITION:
                raise TransferError("FORMAT_MISMATCH", f"{self._address}: {error.details()}") from error
            raise LinkError(describe(error)) from error

    def close(self) -> None:
        """Ends the calls and the channel."""
        self._opening.cancel()  # type: ignore[no-untyped-call]
        if self._stream is not None:
            self._stream.close()
        self._channel.close()


def describe(error: grpc.RpcError) -> str:
    """A failed call in one line."""
    return f"{error.code().name}: {error.details()}"
