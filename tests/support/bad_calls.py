"""Bad input on the wire itself: raw gRPC calls, each with the status and the field that must come back.

`bad_input` has what an SDK lets through; here is what only another client can send. What reaches workers is in
`bad_worker_calls`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from sps2.v1 import generation_pb2, inference_service_pb2, model_service_pb2, tokenizer_service_pb2
from sps2_client import Model

Code = grpc.StatusCode
GENERATE = "/sps2.v1.InferenceService/GenerateText"
CANCEL = "/sps2.v1.InferenceService/CancelGeneration"
WATCH = "/sps2.v1.InferenceService/WatchGeneration"
GET_MODEL = "/sps2.v1.ModelService/GetModel"
TOKENIZE = "/sps2.v1.TokenizerService/TokenizeText"
DETOKENIZE = "/sps2.v1.TokenizerService/DetokenizeTokens"
DECODE = "/sps2.internal.v1.DecodeService/Decode"
TIMEOUT_S = 20.0


@dataclass(frozen=True)
class BadCall:
    """One call and what it must come to."""

    name: str
    method: str
    raw: bytes
    code: grpc.StatusCode
    field: str = ""
    """That BadRequest names; empty: none."""
    reason: str = ""
    """Of ErrorInfo; empty: any of ours, or none where gRPC itself refuses."""
    metadata: tuple[tuple[str, str], ...] = ()
    timeout: float = TIMEOUT_S
    compression: grpc.Compression | None = None
    then: tuple[bytes, ...] = ()
    """Further messages of a call that streams its requests."""
    streams: bool = False
    """Whether it does."""


def spec_calls(model: Model) -> list[BadCall]:
    """Rows of one wrong field of a GenerationSpec."""
    edits: list[tuple[str, str, Callable[[generation_pb2.GenerationSpec], object]]] = [
        ("no prompt", "spec.prompt", lambda s: s.ClearField("text")),
        ("empty text", "spec.text", lambda s: setattr(s, "text", "")),
        ("no messages", "spec.chat.messages", lambda s: s.chat.SetInParent()),
        (
            "a template",
            "spec.chat.chat_template",
            lambda s: setattr(s.chat, "chat_template", "{{ cycler.__init__ }}"),
        ),
        ("a role", "spec.chat.messages[0].role", lambda s: s.chat.messages.add(role="a\nb", content="x")),
        ("token -1", "spec.token_ids.ids[1]", lambda s: s.token_ids.ids.extend([5, -1])),
        (
            "token of none",
            "spec.token_ids.ids[0]",
            lambda s: s.token_ids.ids.append(model.vocabulary_size),
        ),
        ("max_tokens 0", "spec.stop.max_tokens", lambda s: setattr(s.stop, "max_tokens", 0)),
        ("max_tokens -1", "spec.stop.max_tokens", lambda s: setattr(s.stop, "max_tokens", -1)),
        ("temperature NaN", "spec.sampling.temperature", lambda s: _sample(s, temperature=math.nan)),
        ("temperature inf", "spec.sampling.temperature", lambda s: _sample(s, temperature=math.inf)),
        ("temperature -1", "spec.sampling.temperature", lambda s: _sample(s, temperature=-1.0)),
        ("top_p 0", "spec.sampling.top_p", lambda s: _sample(s, top_p=0.0)),
        ("top_p 1.5", "spec.sampling.top_p", lambda s: _sample(s, top_p=1.5)),
        ("top_p NaN", "spec.sampling.top_p", lambda s: _sample(s, top_p=math.nan)),
        ("top_k -2", "spec.sampling.top_k", lambda s: _sample(s, top_k=-2)),
        ("n 0", "spec.num_choices", lambda s: setattr(s, "num_choices", 0)),
        ("n huge", "spec.num_choices", lambda s: setattr(s, "num_choices", 2**31 - 1)),
        ("17 stops", "spec.stop.stop_strings", lambda s: s.stop.stop_strings.extend("x" * 17)),
        ("a long stop", "spec.stop.stop_strings[0]", lambda s: s.stop.stop_strings.append("x" * 257)),
        ("an empty stop", "spec.stop.stop_strings[1]", lambda s: s.stop.stop_strings.extend(["x", ""])),
        ("bias NaN", "spec.sampling.logit_bias[5]", lambda s: s.sampling.logit_bias.update({5: math.nan})),
        (
            "bias of none",
            "spec.sampling.logit_bias[-1]",
            lambda s: s.sampling.logit_bias.update({-1: 1.0}),
        ),
        ("logprobs 21", "spec.num_logprobs", lambda s: setattr(s, "num_logprobs", 21)),
        ("penalty 0", "spec.sampling.repetition_penalty", lambda s: _sample(s, repetition_penalty=0.0)),
        ("id of 65", "spec.request_id", lambda s: setattr(s, "request_id", "x" * 65)),
        ("id with NUL", "spec.request_id", lambda s: setattr(s, "request_id", "a\0b")),
        ("id not ASCII", "spec.request_id", lambda s: setattr(s, "request_id", "ä")),
        ("nonce of 33", "spec.nonce", lambda s: setattr(s, "nonce", b"x" * 33)),
        ("priority 11", "spec.priority", lambda s: setattr(s, "priority", 11)),
        ("profile", "spec.attention_profile", lambda s: setattr(s, "attention_profile", "dense")),
        ("stop token", "spec.stop.stop_token_ids[0]", lambda s: s.stop.stop_token_ids.append(-5)),
    ]
    return [
        BadCall(name, GENERATE, _spec(edit), Code.INVALID_ARGUMENT, field) for name, field, edit in edits
    ] + [
        BadCall(
            "over the context",
            GENERATE,
            _spec(lambda s: setattr(s.stop, "max_tokens", model.context_length)),
            Code.OUT_OF_RANGE,
            "spec.stop.max_tokens",
        ),
        BadCall("a model", GENERATE, _spec(lambda s: setattr(s, "model", "none")), Code.NOT_FOUND),
    ]


def wire_calls() -> list[BadCall]:
    """Rows that are no question of a field: bytes, sizes, metadata, methods, ids, deadlines."""
    whole = _spec(lambda s: None)
    tokenize, detokenize = (
        tokenizer_service_pb2.TokenizeTextRequest,
        tokenizer_service_pb2.DetokenizeTokensRequest,
    )
    huge = whole + b"\x0a" + b"\x80\x80\x80\x20" + b"\x00" * (64 << 20)
    return [
        BadCall("noise", GENERATE, b"\xff" * 24, Code.INVALID_ARGUMENT, reason="MALFORMED_REQUEST"),
        BadCall("cut short", GENERATE, whole[:-2], Code.INVALID_ARGUMENT, reason="MALFORMED_REQUEST"),
        BadCall(
            "no UTF-8",
            GENERATE,
            _spec(lambda s: setattr(s, "text", "hé")).replace("é".encode(), b"\xc3\x28"),
            Code.INVALID_ARGUMENT,
            reason="MALFORMED_REQUEST",
        ),
        BadCall("nesting", GENERATE, b"\x0b" * 200, Code.INVALID_ARGUMENT, reason="MALFORMED_REQUEST"),
        BadCall("64 MiB", GENERATE, huge, Code.RESOURCE_EXHAUSTED),
        BadCall("gzip bomb", GENERATE, huge, Code.RESOURCE_EXHAUSTED, compression=grpc.Compression.Gzip),
        BadCall("metadata", GENERATE, whole, Code.RESOURCE_EXHAUSTED, metadata=(("x-much", "y" * 9000),)),
        BadCall(
            "method", "/sps2.v1.InferenceService/Guess", whole, Code.UNIMPLEMENTED, reason="UNKNOWN_METHOD"
        ),
        BadCall("service", "/sps2.v2.InferenceService/GenerateText", whole, Code.UNIMPLEMENTED),
        BadCall("a worker's call", DECODE, b"", Code.UNIMPLEMENTED, streams=True),
        BadCall("deadline", GENERATE, whole, Code.DEADLINE_EXCEEDED, timeout=0.001),
        BadCall("cancel of none", CANCEL, _about("nobody"), Code.NOT_FOUND, reason="REQUEST_NOT_FOUND"),
        BadCall("cancel without id", CANCEL, b"", Code.INVALID_ARGUMENT, "request_id"),
        BadCall("cancel of a long id", CANCEL, _about("x" * 65), Code.INVALID_ARGUMENT, "request_id"),
        BadCall("watch of none", WATCH, _about("nobody"), Code.NOT_FOUND, reason="REQUEST_NOT_FOUND"),
        BadCall("watch without id", WATCH, b"", Code.INVALID_ARGUMENT, "request_id"),
        BadCall("no model", GET_MODEL, b"", Code.INVALID_ARGUMENT, "name"),
        BadCall(
            "unknown model",
            GET_MODEL,
            model_service_pb2.GetModelRequest(name="x").SerializeToString(),
            Code.NOT_FOUND,
        ),
        BadCall("no text", TOKENIZE, b"", Code.INVALID_ARGUMENT, "text"),
        BadCall(
            "both texts",
            TOKENIZE,
            tokenize(text="x", chat=generation_pb2.ChatMessages()).SerializeToString(),
            Code.INVALID_ARGUMENT,
            "chat",
        ),
        BadCall(
            "a token of none",
            DETOKENIZE,
            detokenize(token_ids=[-1]).SerializeToString(),
            Code.INVALID_ARGUMENT,
            "token_ids[0]",
        ),
    ]


def check_call(channel: grpc.Channel, bad: BadCall) -> None:
    """Makes it; status, reason and field must be right, and nothing of a bug of ours."""
    make: Any = channel.stream_stream if bad.streams else channel.unary_stream
    serialize: Any = None
    request: Any = iter([bad.raw, *bad.then]) if bad.streams else bad.raw
    call = make(bad.method, serialize, serialize)(
        request, timeout=bad.timeout, metadata=bad.metadata, compression=bad.compression
    )
    try:
        answers = list(call)
    except grpc.RpcError:
        pass
    else:
        raise AssertionError(f"{bad.name} was answered with {len(answers)} messages")
    assert call.code() is bad.code, f"{bad.name}: {call.code()} {call.details()}"
    status = rpc_status.from_call(call)
    info, request_info = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details if status is not None else ():
        detail.Unpack(info)
        detail.Unpack(request_info)
    assert bad.reason in {"", info.reason}, f"{bad.name}: {info.reason}"
    fields = [violation.field for violation in request_info.field_violations]
    assert fields == ([bad.field] if bad.field else []), f"{bad.name}: {fields}"
    if bad.field:
        assert info.domain == "sps2"


def check_calls(address: str, calls: list[BadCall]) -> int:
    """All of them over one connection, which they leave usable; how many there were."""
    options = [("grpc.max_send_message_length", -1), ("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(address, options) as channel:
        for bad in calls:
            check_call(channel, bad)
    return len(calls)


def _spec(edit: Callable[[generation_pb2.GenerationSpec], object]) -> bytes:
    spec = generation_pb2.GenerationSpec(text="hello")
    edit(spec)
    return inference_service_pb2.GenerateTextRequest(spec=spec).SerializeToString()


def _sample(spec: generation_pb2.GenerationSpec, **fields: Any) -> None:
    for name, value in fields.items():
        setattr(spec.sampling, name, value)


def _about(request_id: str) -> bytes:
    return inference_service_pb2.CancelGenerationRequest(request_id=request_id).SerializeToString()
