"""One request's trace, from the client's own span to the ranks; and logs and spans without what users wrote."""

import secrets
from itertools import permutations

import grpc
import pytest

from sps2.v1 import generation_pb2
from support.collector import Collector
from support.deployment import LocalDeployment
from support.identity import book_ids
from support.raw_calls import generate
from support.span_tree import check_tree, is_complete, root_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

NUM_PROMPT_TOKENS = 3000
NUM_TOKENS = 48
RANK_SHARE = 0.2
"""Of a second's request: messages wait for cores that others use."""
EXPORT_S = 20.0
CANARY = "canary-7f3a"
TOKEN = "token-canary-91c2"


def test_a_trace_has_every_phase_and_rank(demo: LocalDeployment, traces: Collector) -> None:
    spec = generation_pb2.GenerationSpec(request_id=f"traced-{secrets.token_hex(4)}")
    spec.token_ids.ids.extend(book_ids()[:NUM_PROMPT_TOKENS])
    spec.stop.max_tokens, spec.stop.ignore_eos = NUM_TOKENS, True
    spec.prefix_reuse = generation_pb2.PREFIX_REUSE_OFF  # others ask this deployment about the same text
    trace_id, parent_id = secrets.token_hex(16), secrets.token_hex(8)
    usage = generate(demo.address, spec, ("traceparent", f"00-{trace_id}-{parent_id}-01")).usage
    spans = traces.trace(trace_id, lambda found: is_complete(found, 2, 2), EXPORT_S)
    check_tree(spans, parent_id, RANK_SHARE)
    root = root_of(spans)
    assert root.attributes["sps2.request_id"] == spec.request_id
    assert root.attributes["gen_ai.usage.output_tokens"] == NUM_TOKENS
    assert root.attributes["gen_ai.response.finish_reasons"] == ["length"]
    phases = {span.name: span.seconds for span in spans}
    assert phases["queue"] == pytest.approx(usage.timings.queue, abs=1e-3)
    assert phases["prefill"] == pytest.approx(usage.timings.prefill, abs=1e-3)
    assert sum(span.attributes.get("sps2.num_tokens", 0) for span in spans) == NUM_PROMPT_TOKENS


def test_who_is_not_sampled_leaves_no_span(demo: LocalDeployment, traces: Collector) -> None:
    spec = generation_pb2.GenerationSpec(text="Hello")
    spec.stop.max_tokens = 2
    unsampled, sampled = secrets.token_hex(16), secrets.token_hex(16)
    for trace_id, flags in ((unsampled, "00"), (sampled, "01")):
        generate(demo.address, spec, ("traceparent", f"00-{trace_id}-{secrets.token_hex(8)}-{flags}"))
    traces.trace(sampled, lambda found: is_complete(found, 1, 1), EXPORT_S)
    assert not [span for span in traces.spans if span.trace_id == unsampled]


def test_what_users_write_is_in_no_log_and_no_span(demo: LocalDeployment, traces: Collector) -> None:
    seen = len(demo.process.lines)
    spec = generation_pb2.GenerationSpec(text=CANARY, request_id=f"quiet-{secrets.token_hex(4)}")
    spec.stop.max_tokens = 2
    trace_id = secrets.token_hex(16)
    traced = ("traceparent", f"00-{trace_id}-{secrets.token_hex(8)}-01")
    generate(demo.address, spec, traced, ("authorization", f"Bearer {TOKEN}"))
    spec.sampling.top_p = 2
    with pytest.raises(grpc.RpcError, match="top_p"):
        generate(demo.address, spec, ("authorization", f"Bearer {TOKEN}"))
    traces.trace(trace_id, lambda found: is_complete(found, 1, 1), EXPORT_S)
    for event in ("attempt begins", "prefill starts", "decode starts"):
        fields = (r"attempt=1\b", rf"request_id={spec.request_id}\b")
        both = "|".join(rf"{event} .*{one}.*{other}" for one, other in permutations(fields))
        demo.process.wait_for_line(both, 5.0, after=seen)
    for written in (CANARY, TOKEN):
        assert written not in demo.process.output
        assert not any(written.encode() in batch for batch in traces.raw)
