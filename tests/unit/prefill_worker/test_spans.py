"""Spans of prefill ranks: only of those that computed, from when they began to their last token."""

from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from sps2.internal.v1 import engine_pb2, placement_pb2, prefill_service_pb2
from sps2_prefill_worker.spans import take_rank_spans
from sps2_service.tracing import Tracing


def test_a_span_for_each_rank_that_computed() -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing("sps2-prefill", "prefill-0/0", SimpleSpanProcessor(exporter))
    parent = tracing.request(None)
    assert parent is not None
    report = engine_pb2.PrefillReport(
        delivered=prefill_service_pb2.PrefillDelivered(exposed_s=0.5, kv_transfer_bytes=64),
        times=engine_pb2.ComputeTimes(
            begun_at_us=1_000_000, computed_at_us=3_000_000, delivered_at_us=3_250_000
        ),
    )
    idle = engine_pb2.PrefillReport(times=report.times)
    attempt = placement_pb2.Attempt(request_id="r", number=2)
    take_rank_spans(tracing, parent, "prefill-0", attempt, [7, 0], {0: report, 1: idle})
    (span,) = exporter.get_finished_spans()
    assert span.name == "prefill rank 0"
    assert (span.start_time, span.end_time) == (1_000_000_000, 3_000_000_000)
    assert span.parent is not None
    assert span.parent.span_id == parent.span_id
    assert dict(span.attributes or {}) == {
        "sps2.request_id": "r",
        "sps2.attempt": 2,
        "sps2.group": "prefill-0",
        "sps2.rank": 0,
        "sps2.num_tokens": 7,
        "sps2.delivery_seconds": 0.25,
        "sps2.exposed_communication_seconds": 0.5,
        "sps2.collective_bytes": 0,
        "sps2.kv_transfer_bytes": 64,
    }
