"""A collector of traces: takes what services export by OTLP over gRPC, and finds it again by trace."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.trace.v1 import trace_pb2


@dataclass(frozen=True)
class SeenSpan:
    """A span as it came, with what tests ask of it."""

    service: str
    name: str
    trace_id: str
    """Hexadecimal, as in a traceparent."""
    span_id: str
    parent_id: str
    """Empty for a root."""
    begin_s: float
    end_s: float
    attributes: dict[str, Any]
    failed: bool

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end_s - self.begin_s


@dataclass
class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """What has come so far."""

    address: str = ""
    """host:port."""
    raw: list[bytes] = field(default_factory=list)
    """Every request, for what must not be in it."""
    spans: list[SeenSpan] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def environment(self) -> dict[str, str]:
        """What has services export to it, soon after a span is made."""
        return {"SPS2_OTLP_ENDPOINT": f"http://{self.address}", "OTEL_BSP_SCHEDULE_DELAY": "100"}

    def Export(  # noqa: N802 - named by the proto
        self, request: trace_service_pb2.ExportTraceServiceRequest, _context: object
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        """Takes a batch."""
        found = [
            _seen(span, _values(one.resource.attributes)["service.name"])
            for one in request.resource_spans
            for scope in one.scope_spans
            for span in scope.spans
        ]
        with self._changed:
            self.raw.append(request.SerializeToString())
            self.spans += found
            self._changed.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def trace(
        self, trace_id: str, complete: Callable[[list[SeenSpan]], bool], timeout_s: float
    ) -> list[SeenSpan]:
        """The spans of a trace once they are complete, by their begin.

        Raises:
            AssertionError: they were not in time.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                found = [span for span in self.spans if span.trace_id == trace_id]
                if complete(found):
                    return sorted(found, key=lambda span: span.begin_s)
                names = sorted(span.name for span in found)
                assert self._changed.wait(deadline - time.monotonic()), f"only {names} of {trace_id} came"


def _seen(span: trace_pb2.Span, service: str) -> SeenSpan:
    return SeenSpan(
        service=service,
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        begin_s=span.start_time_unix_nano / 1e9,
        end_s=span.end_time_unix_nano / 1e9,
        attributes=_values(span.attributes),
        failed=span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
    )


def _values(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: common_pb2.AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    return getattr(value, str(kind))


@contextmanager
def collector() -> Iterator[Collector]:
    """A collector on a free port."""
    server = grpc.server(ThreadPoolExecutor(4))
    taker = Collector()
    register: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server  # not annotated
    register(taker, server)
    taker.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield taker
    finally:
        server.stop(0).wait()
