"""Tracing: places before spans, who samples, W3C context through a call, and an end in time."""

import socket
import time

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags

from sps2_service.channel import open_channel
from sps2_service.server import ServiceServer
from sps2_service.trace_context import Place, TraceInterceptor, current_place, metadata_of
from sps2_service.tracing import CLOSE_TIMEOUT_S, Span, Tracing, UnixClock, open_tracing
from support.collector import collector
from support.echo_service import SERVICE, Echo, EchoServicer, EchoStub

CALLER = SpanContext(0xABC, 0xDEF, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))


def in_memory(sample_ratio: float = 1.0) -> tuple[Tracing, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    return Tracing("t", "t-0", SimpleSpanProcessor(exporter), sample_ratio=sample_ratio), exporter


def context_of(span: ReadableSpan) -> SpanContext:
    context: SpanContext | None = span.context
    assert context is not None
    return context


def test_a_span_is_where_others_were_told_it_would_be() -> None:
    tracing, exporter = in_memory()
    root = tracing.request(None)
    assert root is not None
    child = tracing.beneath(root)
    tracing.take(Span("child", child, root, 5, 9, {"sps2.rank": 1}, error="RANK_DIED"))
    tracing.take(Span("root", root, None, 3, 12, {}, SpanKind.SERVER))
    first, second = exporter.get_finished_spans()
    for span, place in ((first, child), (second, root)):
        assert (context_of(span).trace_id, context_of(span).span_id) == (place.trace_id, place.span_id)
    assert first.parent is not None
    assert first.parent.span_id == root.span_id
    assert second.parent is None
    assert (first.start_time, first.end_time) == (5, 9)
    assert dict(first.attributes or {}) == {"sps2.rank": 1, "error.type": "RANK_DIED"}
    assert not first.status.is_ok
    assert second.resource.attributes["service.name"] == "t"


def test_the_caller_decides_else_the_ratio() -> None:
    never, _ = in_memory(0.0)
    always, _ = in_memory(1.0)
    beneath = never.request(CALLER)
    assert beneath is not None
    assert beneath.trace_id == CALLER.trace_id
    not_sampled = SpanContext(0xABC, 0xDEF, is_remote=True, trace_flags=TraceFlags(TraceFlags.DEFAULT))
    assert always.request(not_sampled) is None
    assert never.request(None) is None
    half, _ = in_memory(0.5)
    assert 300 < sum(half.request(None) is not None for _ in range(1000)) < 700


def test_readings_become_unix_time() -> None:
    now = time.monotonic()
    clock = UnixClock(now)
    assert clock.ns(now) == pytest.approx(time.time_ns(), abs=1e9)
    assert clock.ns(now + 2) - clock.ns(now) == pytest.approx(2e9, abs=1e3)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (metadata_of(CALLER), CALLER),
        ((("traceparent", "00-nonsense-01"),), None),
        ((), None),
        (metadata_of(None), None),
    ],
)
async def test_a_call_knows_the_span_it_is_made_beneath(
    metadata: tuple[tuple[str, str], ...], expected: Place | None
) -> None:
    seen: list[Place | None] = []
    server = ServiceServer(interceptors=[TraceInterceptor()])
    server.add(EchoServicer(lambda _: seen.append(current_place.get())), SERVICE)
    address = await server.start("127.0.0.1:0")
    try:
        async with open_channel(address) as channel:
            await EchoStub(channel).unary(Echo(text="x"), timeout=5, metadata=metadata)
    finally:
        await server.stop(0)
    (found,) = seen
    if expected is None or found is None:
        assert found is expected
        return
    assert (found.trace_id, found.span_id) == (expected.trace_id, expected.span_id)
    assert found.trace_flags.sampled


async def test_what_is_left_is_sent_at_the_end() -> None:
    with collector() as taker:
        async with open_tracing("sps2-router", "r-0", f"http://{taker.address}", 1.0) as tracing:
            assert tracing is not None
            place = tracing.beneath(CALLER)
            tracing.take(Span("queue", place, CALLER, 1_000, 2_000, {}))
        (span,) = taker.spans
        assert (span.name, span.service) == ("queue", "sps2-router")
        assert (span.trace_id, span.parent_id) == (f"{CALLER.trace_id:032x}", f"{CALLER.span_id:016x}")


async def test_a_collector_that_does_not_answer_delays_nobody_for_long() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        async with open_tracing("s", "", f"http://127.0.0.1:{silent.getsockname()[1]}", 1.0) as tracing:
            assert tracing is not None
            tracing.take(Span("queue", tracing.beneath(CALLER), CALLER, 1_000, 2_000, {}))
        assert time.monotonic() - started < CLOSE_TIMEOUT_S + 5


async def test_off_without_an_endpoint() -> None:
    async with open_tracing("s", "", "", 1.0) as tracing:
        assert tracing is None
