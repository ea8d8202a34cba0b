"""The router over real gRPC. Bad input: each row of the table gets its status, and the field is named."""

from typing import Any

import pytest

from sps2.v1 import (
    generation_pb2,
)
from support.router_deployment import Code, Deployment, failure, fields, prompt, reason, status_of
from support.tiny_model import CONTEXT_LENGTH, VOCABULARY_SIZE

pytestmark = pytest.mark.service


NAN = float("nan")
Sampling, Stop, Ids = generation_pb2.SamplingSpec, generation_pb2.StopSpec, generation_pb2.TokenIds
BAD_SPECS: list[tuple[generation_pb2.GenerationSpec, str]] = [
    (generation_pb2.GenerationSpec(), "spec.prompt"),
    (prompt(""), "spec.text"),
    (generation_pb2.GenerationSpec(token_ids=Ids()), "spec.token_ids.ids"),
    (generation_pb2.GenerationSpec(token_ids=Ids(ids=[3, -1])), "spec.token_ids.ids[1]"),
    (generation_pb2.GenerationSpec(token_ids=Ids(ids=[VOCABULARY_SIZE])), "spec.token_ids.ids[0]"),
    (prompt(stop=Stop(max_tokens=0)), "spec.stop.max_tokens"),
    (prompt(stop=Stop(max_tokens=-3)), "spec.stop.max_tokens"),
    (prompt(stop=Stop(stop_token_ids=[5] * 65)), "spec.stop.stop_token_ids"),
    (prompt(stop=Stop(stop_token_ids=[-1])), "spec.stop.stop_token_ids[0]"),
    (prompt(sampling=Sampling(temperature=NAN)), "spec.sampling.temperature"),
    (prompt(sampling=Sampling(temperature=float("inf"))), "spec.sampling.temperature"),
    (prompt(sampling=Sampling(temperature=-0.1)), "spec.sampling.temperature"),
    (prompt(sampling=Sampling(top_p=0)), "spec.sampling.top_p"),
    (prompt(sampling=Sampling(top_p=1.01)), "spec.sampling.top_p"),
    (prompt(sampling=Sampling(top_p=NAN)), "spec.sampling.top_p"),
    (prompt(sampling=Sampling(top_k=-2)), "spec.sampling.top_k"),
    (prompt(request_id="x" * 65), "spec.request_id"),
    (prompt(request_id="a\nb"), "spec.request_id"),
    (prompt(request_id="é"), "spec.request_id"),
    (prompt(nonce=b"x" * 33), "spec.nonce"),
]


@pytest.mark.parametrize(("spec", "field"), BAD_SPECS)
async def test_a_bad_field_is_named(up: Deployment, spec: generation_pb2.GenerationSpec, field: str) -> None:
    for call in (up.stream(spec), up.whole(spec)):
        error = await failure(call)
        assert (error.code(), fields(error)) == (Code.INVALID_ARGUMENT, [field])
        assert field in status_of(error).message
    assert not up.decode.reserved


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (prompt("x" * CONTEXT_LENGTH), "spec.prompt"),
        (generation_pb2.GenerationSpec(token_ids=Ids(ids=[5] * CONTEXT_LENGTH)), "spec.prompt"),
        (prompt("x" * 500, stop=Stop(max_tokens=12)), "spec.stop.max_tokens"),
    ],
)
async def test_what_does_not_fit_the_context(
    up: Deployment, spec: generation_pb2.GenerationSpec, field: str
) -> None:
    error = await failure(up.stream(spec))
    assert (error.code(), reason(error)) == (Code.OUT_OF_RANGE, "CONTEXT_LENGTH_EXCEEDED")
    assert fields(error) == [field]


async def test_an_unknown_model(up: Deployment) -> None:
    error = await failure(up.stream(prompt(model="gpt-9")))
    assert (error.code(), reason(error)) == (Code.NOT_FOUND, "MODEL_NOT_FOUND")
    assert "'tiny'" in status_of(error).message


@pytest.mark.parametrize("raw", [b"\xff\xff\xff", b"\x0a\x04\x22\x02\xff\xfe"])
async def test_malformed_bytes(up: Deployment, raw: bytes) -> None:
    service = "/sps2.v1.InferenceService"
    methods: Any = [(up.channel.unary_stream, "StreamGenerateText"), (up.channel.unary_unary, "GenerateText")]
    for make, name in methods:
        method: Any = make(f"{service}/{name}")
        error = await failure(method(raw, timeout=5))
        assert (error.code(), reason(error)) == (Code.INVALID_ARGUMENT, "MALFORMED_REQUEST")
