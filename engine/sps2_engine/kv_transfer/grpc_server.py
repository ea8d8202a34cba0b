"""The target's half of KvTransferService: the in-engine server that opens rings and takes streamed slabs.

Bound to the interface it is given, trusted network only. Handlers run in the server's threads; what concerns
rings is done by the receiver's thread through `Desk`.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import grpc

from sps2.internal.v1.kv_transfer_service_pb2 import (
    DESCRIPTOR,
    KvFormat,
    OpenRingRequest,
    OpenRingResponse,
    PushSlabsRequest,
    PushSlabsResponse,
    SlabAck,
    SlabHeader,
)
from sps2_engine.kv_transfer.base import LinkError, RingLimitError
from sps2_engine.kv_transfer.grpc import MAX_MESSAGE_BYTES, SOURCE_METADATA_KEY
from sps2_engine.kv_transfer.refusals import Refusal, streaming, unary
from sps2_engine.kv_transfer.slab import format_fault, format_mismatch, slab_fault


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


class TransferServicer:
    """Implements `sps2.internal.v1.KvTransferService`: unpacks, calls the desk, packs."""

    def __init__(self, desk: Desk, kv_format: KvFormat) -> None:
        self._desk = desk
        self._format = kv_format

    def open_ring(self, request: OpenRingRequest, _context: grpc.ServicerContext) -> OpenRingResponse:
        """See the proto.

        Raises:
            Refusal: as the proto has it.
        """
        code = grpc.StatusCode
        if not request.source_incarnation:
            raise Refusal.of_field("source_incarnation", "is empty")
        if fault := format_fault(self._format, request.format):
            raise Refusal.of_field(f"format.{fault.field}", fault.description)
        if difference := format_mismatch(self._format, request.format):
            raise Refusal(code.FAILED_PRECONDITION, "FORMAT_MISMATCH", f"KV format: {difference}")
        try:
            return self._desk.open_ring(request)
        except RingLimitError as error:
            raise Refusal(code.RESOURCE_EXHAUSTED, "RING_LIMIT", str(error)) from None
        except LinkError as error:
            raise Refusal.of_field("agent_metadata", str(error)) from None
        except TimeoutError:
            raise Refusal(code.UNAVAILABLE, "RECEIVER_STUCK", "the receiver does not answer") from None

    def push_slabs(
        self, requests: Iterator[PushSlabsRequest], context: grpc.ServicerContext
    ) -> Iterator[PushSlabsResponse]:
        """See the proto. The stream's metadata names the source, whose ring is trusted while it is open.

        Raises:
            Refusal: the stream has no source, or a slab that no placement could take.
        """
        source = _source_of(context)
        if not source:
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                "NO_SOURCE",
                f"{SOURCE_METADATA_KEY} is missing in the metadata",
            )
        self._desk.tie(source)
        try:
            # The source posts nothing before it has seen this.
            context.send_initial_metadata(())
            for request in requests:
                if fault := slab_fault(request, self._format):
                    raise Refusal.of_field(fault.field, fault.description)
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
    servicer = TransferServicer(desk, kv_format)
    handlers = {
        "OpenRing": unary(OpenRingRequest, servicer.open_ring),
        "PushSlabs": streaming(PushSlabsRequest, servicer.push_slabs),
    }
    name = DESCRIPTOR.services_by_name["KvTransferService"].full_name
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
    port = server.add_insecure_port(f"[{host}]:0" if ":" in host else f"{host}:0")
    server.start()
    return server, port


def _source_of(context: grpc.ServicerContext) -> str:
    for key, value in context.invocation_metadata():
        if key == SOURCE_METADATA_KEY:
            return str(value)
    return ""
