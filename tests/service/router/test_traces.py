"""The router over real gRPC: the spans of its requests, and what leaders are told of them."""

from collections.abc import Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import format_span_id, format_trace_id

from sps2.v1 import inference_service_pb2
from sps2_service.tracing import Tracing
from support.fake_workers import NO_KV, rank_died
from support.router_deployment import Deployment, failure, prompt, until

pytestmark = pytest.mark.service


class Traced(Deployment):
    """A router whose spans stay here."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        tracing = Tracing("sps2-router", "r", SimpleSpanProcessor(self.exporter))
        # Only whether there is an endpoint counts: it says that callers' spans are looked for.
        super().__init__(tracing=tracing, otlp_endpoint="http://127.0.0.1:1")

    async def spans(self) -> Sequence[ReadableSpan]:
        """Those of one request, the request's own last."""
        await until(lambda: any(span.parent is None for span in self.exporter.get_finished_spans()))
        return self.exporter.get_finished_spans()


def _name(span: ReadableSpan) -> str:
    return str(span.name)


def _facts(span: ReadableSpan) -> tuple[str, object, object]:
    attributes = span.attributes or {}
    return _name(span), attributes.get("sps2.attempt"), attributes.get("error.type")


async def test_phases_meet_and_leaders_are_told_their_place() -> None:
    async with Traced() as up:
        assert (await up.generate(prompt("hello world", request_id="r-1"))).text == "abcd"
        *phases, root = await up.spans()
        assert [_name(span) for span in phases] == ["queue", "prefill", "transfer", "decode"]
        assert root.name == "text_completion tiny"
        for earlier, later in zip([None, *phases], [*phases, None], strict=True):
            end = root.start_time if earlier is None else earlier.end_time
            begin = root.end_time if later is None else later.start_time
            assert end == pytest.approx(begin, abs=20e6 if later is None else 1e5)
        _, prefill, _, decode = phases
        for leader, span in ((up.prefill, prefill), (up.decode, decode)):
            assert span.context is not None
            trace_id, span_id = format_trace_id(span.context.trace_id), format_span_id(span.context.span_id)
            assert leader.traceparents == [f"00-{trace_id}-{span_id}-01"]
        assert root.attributes is not None
        assert root.attributes["gen_ai.usage.output_tokens"] == 4
        assert root.attributes["sps2.request_id"] == "r-1"


async def test_a_second_attempt_has_phases_of_its_own() -> None:
    async with Traced() as up:
        up.decode.refusals = [NO_KV, NO_KV]
        up.decode.fail_after = [(1, rank_died("decode-0/1"))]
        assert (await up.generate(prompt())).text == "abcd"
        *phases, root = await up.spans()
        assert [_facts(span) for span in phases] == [
            ("queue", 3, None),  # the first two had no room
            ("prefill", 3, None),
            ("transfer", 3, None),
            ("decode", 3, "RANK_DIED"),
            ("queue", 4, None),
            ("prefill", 4, None),
            ("transfer", 4, None),
            ("decode", 4, None),
        ]
        assert _facts(root)[2] is None


async def test_how_it_ended_is_told_of_the_last_phase_and_the_request() -> None:
    async with Traced() as up:
        up.prefill.may_sample.clear()
        call = up.stream()
        await until(lambda: up.prefill.num_live == 1)
        call.cancel()
        *phases, root = await up.spans()
        assert [_facts(span) for span in phases] == [("queue", 1, None), ("prefill", 1, "CANCELLED")]
        assert _facts(root)[2] == "CANCELLED"
        up.exporter.clear()
        await failure(up.stream(prompt(model="another")))
        (root,) = await up.spans()
        assert _facts(root)[2] == "MODEL_NOT_FOUND"


async def test_who_is_not_sampled_has_no_span_and_tells_nobody() -> None:
    async with Traced() as up:
        metadata = (("traceparent", f"00-{'1' * 32}-{'2' * 16}-00"),)
        request = inference_service_pb2.GenerateTextRequest(spec=prompt())
        assert (await up.inference.GenerateText(request, timeout=10, metadata=metadata)).text == "abcd"
        assert up.prefill.traceparents == up.decode.traceparents == [None]
        await up.assert_all_freed()
        assert not up.exporter.get_finished_spans()
