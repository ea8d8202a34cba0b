"""Must show 4: one trace of one request, from the client's own span to the ranks, at a collector."""

import secrets
from functools import partial

import pytest

from sps2.v1 import generation_pb2
from support.collector import collector
from support.deployment import deployment
from support.identity import book_ids
from support.must_show import MustShow
from support.raw_calls import generate
from support.span_tree import check_tree, is_complete

pytestmark = pytest.mark.acceptance

LENGTHS = (4_000, 24_000)
NUM_TOKENS = 200
EXPORT_S = 20.0


@pytest.mark.parametrize(("prefill", "decode"), [("1x2", "1x2"), ("1x4", "1x1")])
def test_trace(must_show: MustShow, prefill: str, decode: str) -> None:
    with (
        must_show(f"4 one trace of a request over {prefill} prefill and {decode} decode ranks") as figures,
        collector() as traces,
        deployment(prefill=prefill, decode=decode, env=traces.environment) as running,
    ):
        complete = partial(is_complete, num_prefill=int(prefill[-1]), num_decode=int(decode[-1]))
        text = book_ids() * (1 + max(LENGTHS) // len(book_ids()))
        for length in LENGTHS:
            spec = generation_pb2.GenerationSpec()
            spec.token_ids.ids.extend(text[:length])
            spec.stop.max_tokens, spec.stop.ignore_eos = NUM_TOKENS, True
            trace_id, parent_id = secrets.token_hex(16), secrets.token_hex(8)
            generate(running.address, spec, ("traceparent", f"00-{trace_id}-{parent_id}-01"))
            spans = traces.trace(trace_id, complete, EXPORT_S)
            figures.append(f"{length:,} tokens: {check_tree(spans, parent_id)}")
