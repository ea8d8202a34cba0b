"""Where in a trace a call is made, as W3C Trace Context has it, in gRPC metadata. Knows nothing of what is recorded."""

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any, TypeAlias

import grpc
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, SpanContext, get_current_span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from sps2_service.interceptors import guarded

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation: TypeAlias = Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]]
Place: TypeAlias = SpanContext
"""Where a span is: its trace, its own id, and whether the trace is recorded."""

TRACEPARENT = "traceparent"

_W3C = TraceContextTextMapPropagator()

current_place: ContextVar[Place | None] = ContextVar("sps2_place", default=None)
"""Span of the caller of the call that the running task serves; None where it has none."""


def metadata_of(place: Place | None) -> tuple[tuple[str, str], ...]:
    """What a call made beneath a span carries, as W3C Trace Context has it; nothing without a span.

    Given with each call, not by a client interceptor: in grpc.aio that puts a task and a queue between a stream and
    its reader, for every token.
    """
    carrier: dict[str, str] = {}
    if place is not None:
        _W3C.inject(carrier, set_span_in_context(NonRecordingSpan(place), Context()))
    return tuple(carrier.items())


class TraceInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg] # generic in the stubs only
    """Sets `current_place` for calls whose metadata has a valid W3C `traceparent`."""

    async def intercept_service(  # type: ignore[override] # the stubs do not know that there may be no handler
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> "Handler | None":
        """Called by gRPC once for each call."""
        handler = await continuation(handler_call_details)
        metadata = handler_call_details.invocation_metadata or ()
        carrier = {key: value for key, value in metadata if isinstance(value, str)}
        if handler is None or TRACEPARENT not in carrier:
            return handler
        place = get_current_span(_W3C.extract(carrier, Context())).get_span_context()

        def enter(_: object) -> None:
            current_place.set(place if place.is_valid else None)

        return guarded(handler, enter)
