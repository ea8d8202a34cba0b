"""Spans of prefill ranks, made from the times that they report when all of an attempt's KV is delivered."""

from collections.abc import Mapping, Sequence

from sps2.internal.v1 import engine_pb2, placement_pb2
from sps2_service import span_names as names
from sps2_service.trace_context import Place
from sps2_service.tracing import Attributes, Span, Tracing


def take_rank_spans(
    tracing: Tracing,
    parent: Place,
    group: str,
    attempt: placement_pb2.Attempt,
    num_tokens_on: Sequence[int],
    reports: Mapping[int, engine_pb2.PrefillReport],
) -> None:
    """A span for each rank that had something to compute, from its begin to its last token.

    Args:
        tracing: takes them.
        parent: the router's span.
        group: name of the group.
        attempt: what was computed.
        num_tokens_on: tokens that each rank computed.
        reports: by rank, those that tell `delivered`.
    """
    for rank, report in sorted(reports.items()):
        if not num_tokens_on[rank]:
            continue
        times = report.times
        after = max(0, times.delivered_at_us - times.computed_at_us)
        attributes: Attributes = {
            names.REQUEST_ID: attempt.request_id,
            names.ATTEMPT: attempt.number,
            names.GROUP: group,
            names.RANK: rank,
            names.NUM_TOKENS: num_tokens_on[rank],
            names.EXPOSED_SECONDS: report.delivered.exposed_s,
            names.DELIVERY_SECONDS: after / 1e6,
            names.COLLECTIVE_BYTES: report.delivered.collective_bytes,
            names.KV_TRANSFER_BYTES: report.delivered.kv_transfer_bytes,
        }
        place = tracing.beneath(parent)
        begin_ns, end_ns = times.begun_at_us * 1000, times.computed_at_us * 1000
        tracing.take(Span(f"{names.PREFILL_RANK} {rank}", place, parent, begin_ns, end_ns, attributes))
