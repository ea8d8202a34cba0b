"""The target's half of KvTransferService: the in-engine server that opens rings and takes streamed slabs.

Bound to the interface it is given, trusted network only. Handlers run in the server's threads; what concerns
rings is done by the receiver's thread through `Desk`.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn, Protocol

import grpc

from sps2.internal.v1.kv_transfer_service_pb2 import (
    KvFormat,
    OpenRingRequest,
    OpenRingResponse,
    PushSlabsRequest,
    PushSlabsResponse,
    SlabAck,
    SlabHeader,
)
from sps2.internal.v1.kv_transfer_service_pb2_grpc import (
    KvTransferServiceServicer,
    add_KvTransferServiceServicer_to_server,
)
from sps2_engine.kv_transfer.base import LinkError, RingLimitError
from sps2_engine.kv_transfer.grpc import MAX_MESSAGE_BYTES, SOURCE_METADATA_KEY
from sps2_engine.kv_transfer.slab import format_mismatch


class Desk(Protocol):
    """What the server asks of its receiver; called from the server's threads."""

    def open_ring(self, request: OpenRingRequest) -> OpenRingResponse:
        """Raises RingLimitError, LinkError (bad metadata) or TimeoutError."""

    def tie(self, source_incarnation: str) -> None:
        """A stream of that source begins; returns when slabs of its ring are taken."""

    def untie(self, source_incarnation: str) -> None:
        """A stream of that source ended."""

    def take(self, header: SlabHeader, source_incarnation: str, copy: Callable[[], memoryview]) -> SlabAck:
        """See `SlabIntake.take`."""


class TransferServicer(KvTransferServiceServicer):
    """Unpacks, calls the desk, packs."""

    def __init__(self, desk: Desk, kv_format: KvFormat) -> None:
        self._desk = desk
        self._format = kv_format

    def OpenRing(self, request: OpenRingRequest, context: grpc.ServicerContext) -> OpenRingResponse:  # noqa: N802
        """See the proto."""
        if not request.source_incarnation:
            _abort(context, grpc.StatusCode.INVALID_ARGUMENT, "source_incarnation is empty")
        if difference := format_mismatch(self._format, request.format):
            _abort(context, grpc.StatusCode.FAILED_PRECONDITION, f"KV format: {difference}")
        try:
            return self._desk.open_ring(request)
        except RingLimitError as error:
            _abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except LinkError as error:
            _abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except TimeoutError:
            _abort(context, grpc.StatusCode.UNAVAILABLE, "the receiver does not answer")

    def PushSlabs(  # noqa: N802
        self, request_iterator: Iterator[PushSlabsRequest], context: grpc.ServicerContext
    ) -> Iterator[PushSlabsResponse]:
        """See the proto. The stream's metadata names the source, whose ring is trusted while it is open."""
        source = _source_of(context)
        if not source:
            _abort(context, grpc.StatusCode.INVALID_ARGUMENT, f"{SOURCE_METADATA_KEY} is missing")
        self._desk.tie(source)
        try:
            # The source posts nothing before it has seen this.
            context.send_initial_metadata(())
            for request in request_iterator:
                # The message is the target's own copy already.
                ack = self._desk.take(request.header, source, lambda r=request: memoryview(r.payload))  # type: ignore[misc]
                yield PushSlabsResponse(ack=ack)
        finally:
            self._desk.untie(source)


def serve(desk: Desk, kv_format: KvFormat, host: str, max_sources: int) -> tuple[grpc.Server, int]:
    """A started server on a free port of `host`, and the port.

    A stream holds a thread for its life, so there are as many as sources, and a few for handshakes.

    Raises:
        RuntimeError: `host` cannot be bound.
    """
    server = grpc.server(
        ThreadPoolExecutor(max_sources + 4, thread_name_prefix="kv-server"),
        options=(
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_time_ms", 10_000),
            ("grpc.keepalive_timeout_ms", 5_000),
            # Sources ping silent streams; by default a server ends a connection that does.
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ),
    )
    add_KvTransferServiceServicer_to_server(TransferServicer(desk, kv_format), server)
    port = server.add_insecure_port(f"[{host}]:0" if ":" in host else f"{host}:0")
    server.start()
    return server, port


def _source_of(context: grpc.ServicerContext) -> str:
    for key, value in context.invocation_metadata():
        if key == SOURCE_METADATA_KEY:
            return str(value)
    return ""


def _abort(context: grpc.ServicerContext, code: grpc.StatusCode, details: str) -> NoReturn:
    context.abort(code, details)
    raise AssertionError("abort raises")
