"""Spans of requests, sent to a collector by OTLP; off unless an endpoint is set.

A span is made when it is over, from times that its service has noted anyway: the paths of tokens and steps do nothing
for it. Its place in the trace is drawn when it begins, since whoever works beneath it is told of it before it ends.
Who sampled a request decides for all that is beneath it. Knows nothing of what requests are.
"""

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeAlias

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, Decision, TraceIdRatioBased
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from sps2_service import span_names
from sps2_service.trace_context import Place

Attributes: TypeAlias = Mapping[str, str | bool | int | float | list[str]]

EXPORT_TIMEOUT_S = 2.0
"""What the collector may take for a batch, retries included; then the batch is dropped."""
CLOSE_TIMEOUT_S = 3.0
"""What the last spans may take when the process ends; within the margin of the chart's grace period."""


class UnixClock:
    """Readings of a monotonic clock as Unix time. Fixed when made: spans of one request meet exactly."""

    def __init__(self, reading: float) -> None:
        """`reading` is what the clock shows now, in seconds."""
        self._offset_ns = time.time_ns() - round(reading * 1e9)

    def ns(self, reading: float) -> int:
        """Nanoseconds since 1970."""
        return self._offset_ns + round(reading * 1e9)


@dataclass(frozen=True)
class Span:
    """A span that is over."""

    name: str
    place: Place
    parent: Place | None
    begin_ns: int
    """Unix time."""
    end_ns: int
    attributes: Attributes
    """By the names of `span_names`."""
    kind: SpanKind = SpanKind.INTERNAL
    error: str = ""
    """Why it failed, in UPPER_SNAKE; empty when it did not."""


class _ToldIds(RandomIdGenerator):
    """Random ids, but for the next span, whose place others have been told of already."""

    def __init__(self) -> None:
        self.next: Place | None = None

    def generate_trace_id(self) -> int:
        return self.next.trace_id if self.next else super().generate_trace_id()

    def generate_span_id(self) -> int:
        return self.next.span_id if self.next else super().generate_span_id()


class Tracing:
    """Draws places and takes spans; used on one thread. What it takes is sent in the background."""

    def __init__(
        self, service: str, instance: str, processor: SpanProcessor, *, sample_ratio: float = 1.0
    ) -> None:
        """`instance` tells replicas of a service apart; `sample_ratio` is for requests whose caller traces nothing."""
        resource = Resource.create(
            {"service.namespace": "sps2", "service.name": service, "service.instance.id": instance}
        )
        self._ids = _ToldIds()
        self._sampler = TraceIdRatioBased(sample_ratio)
        self._provider = TracerProvider(ALWAYS_ON, resource, shutdown_on_exit=False, id_generator=self._ids)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("sps2")

    def request(self, caller: Place | None) -> Place | None:
        """The place of a request's own span; None where it is not recorded, by its caller's word or by the ratio."""
        if caller is not None:
            return self.beneath(caller) if caller.trace_flags.sampled else None
        trace_id = self._ids.generate_trace_id()
        decision = self._sampler.should_sample(None, trace_id, "").decision
        return self._place(trace_id) if decision is Decision.RECORD_AND_SAMPLE else None

    def beneath(self, parent: Place) -> Place:
        """A place for a span whose parent is, or will be, at `parent`."""
        return self._place(parent.trace_id)

    def take(self, span: Span) -> None:
        """Records a span."""
        context = (
            Context()
            if span.parent is None
            else set_span_in_context(NonRecordingSpan(span.parent), Context())
        )
        self._ids.next = span.place
        try:
            made = self._tracer.start_span(
                span.name, context, span.kind, span.attributes, start_time=span.begin_ns
            )
        finally:
            self._ids.next = None
        if span.error:
            made.set_attribute(span_names.ERROR, span.error)
            made.set_status(Status(StatusCode.ERROR))
        made.end(max(span.begin_ns, span.end_ns))

    async def close(self) -> None:
        """Sends what is left, for as long as CLOSE_TIMEOUT_S allows."""
        sending = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        sending.start()
        await asyncio.to_thread(sending.join, CLOSE_TIMEOUT_S)

    def _place(self, trace_id: int) -> Place:
        return SpanContext(
            trace_id,
            self._ids.generate_span_id(),
            is_remote=False,
            trace_flags=TraceFlags(TraceFlags.SAMPLED),
        )


@asynccontextmanager
async def open_tracing(
    service: str, instance: str, endpoint: str, sample_ratio: float
) -> AsyncIterator[Tracing | None]:
    """Tracing to the OTLP/gRPC collector at `endpoint`, `http[s]://HOST:PORT`; None where that is empty.

    Certificates, headers and further resource attributes are taken from OpenTelemetry's own variables.
    """
    if not endpoint:
        yield None
        return
    exporter = OTLPSpanExporter(
        endpoint=endpoint, insecure=endpoint.startswith("http://"), timeout=EXPORT_TIMEOUT_S
    )
    name = instance or uuid.uuid4().hex
    tracing = Tracing(service, name, BatchSpanProcessor(exporter), sample_ratio=sample_ratio)
    try:
        yield tracing
    finally:
        await tracing.close()
