"""Requests and checkpoints that must be refused, and how (reliability.md, "Bad input")."""

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from safetensors.torch import load_file, save_file

from sps2.v1 import generation_pb2, inference_service_pb2
from sps2_client import Client, GenerationOptions, InvalidArgument, Model, NotFound, OutOfRange, SPS2Error
from support.deployment import SPS2, LocalDeployment
from support.process import ManagedProcess

CALL_TIMEOUT_S = 30.0
REFUSAL_TIMEOUT_S = 120.0
STREAM_METHOD = "/sps2.v1.InferenceService/StreamGenerateText"
LEADER_METHODS = {
    "prefill": "/sps2.internal.v1.PrefillService/Prefill",
    "decode": "/sps2.internal.v1.DecodeService/Decode",
}
MALFORMED_SAYS = r"no valid protobuf message.*check its bytes"


@dataclass(frozen=True)
class BadRequest:
    """One request that the service must refuse."""

    name: str
    error: type[SPS2Error]
    says: str
    """Pattern of the message: what is wrong and what to do."""
    names: str = ""
    """The field that must be named; empty where the status has none."""
    prompt: str | None = None
    options: GenerationOptions = field(default_factory=GenerationOptions)


def bad_requests(model: Model) -> list[BadRequest]:
    """What the SDK lets through and the router must not."""
    last_id, room = model.vocabulary_size - 1, model.context_length
    ids = "spec.token_ids.ids"
    vocabulary = rf"has token ids from 0 to {last_id}"
    return [
        BadRequest("empty text", InvalidArgument, "send at least one character", "spec.text", ""),
        BadRequest(
            "no token ids", InvalidArgument, "send at least one token id", ids, options={"token_ids": []}
        ),
        BadRequest(
            "token id too large",
            InvalidArgument,
            vocabulary,
            f"{ids}[1]",
            options={"token_ids": [last_id, last_id + 1]},
        ),
        BadRequest(
            "token id negative", InvalidArgument, vocabulary, f"{ids}[0]", options={"token_ids": [-1]}
        ),
        BadRequest(
            "prompt beyond context",
            OutOfRange,
            rf"at most {room - 1} .*shorten it",
            "spec.prompt",
            options={"token_ids": [5] * room},
        ),
        BadRequest(
            "prompt and output beyond context",
            OutOfRange,
            rf"has room for {room - 3}: ask for fewer or shorten",
            "spec.stop.max_tokens",
            options={"token_ids": [5] * 3, "max_tokens": room},
        ),
        BadRequest(
            "NaN temperature",
            InvalidArgument,
            "send a finite number >= 0",
            "spec.sampling.temperature",
            "hello",
            {"temperature": math.nan},
        ),
        BadRequest(
            "infinite temperature",
            InvalidArgument,
            "send a finite number >= 0",
            "spec.sampling.temperature",
            "hello",
            {"temperature": math.inf},
        ),
        BadRequest(
            "top_p of 0",
            InvalidArgument,
            r"send a number in \(0, 1\]",
            "spec.sampling.top_p",
            "hello",
            {"top_p": 0.0},
        ),
        BadRequest(
            "max_tokens of 0",
            InvalidArgument,
            "send at least 1",
            "spec.stop.max_tokens",
            "hello",
            {"max_tokens": 0},
        ),
        *bad_choices(vocabulary, last_id),
        BadRequest(
            "unknown attention profile",
            InvalidArgument,
            "send one of exact, paper, default",
            "spec.attention_profile",
            "hello",
            {"attention_profile": "dense"},
        ),
        BadRequest(
            "unknown model",
            NotFound,
            f"leave spec.model empty or set it to '{re.escape(model.name)}'",
            prompt="hello",
            options={"model": "no-such-model"},
        ),
    ]


def bad_choices(vocabulary: str, last_id: int) -> list[BadRequest]:
    """Ways to choose tokens that there are not, by the field that they break."""
    sampling, stop = "spec.sampling.", "spec.stop."
    cases: list[tuple[str, str, GenerationOptions]] = [
        (sampling + "top_k", "send -1 or 0", {"top_k": -2}),
        (sampling + "min_p", "from 0 to 1", {"min_p": 1.5}),
        (sampling + "repetition_penalty", "from 0.01 to 100", {"repetition_penalty": 0.0}),
        (sampling + "presence_penalty", "from -2 to 2", {"presence_penalty": math.nan}),
        (sampling + "frequency_penalty", "from -2 to 2", {"frequency_penalty": 2.5}),
        (sampling + f"logit_bias[{last_id + 1}]", vocabulary, {"logit_bias": {last_id + 1: 1.0}}),
        (sampling + "logit_bias[5]", "from -100 to 100", {"logit_bias": {5: math.inf}}),
        (sampling + "first_choice", "0 or more", {"first_choice": -1}),
        (stop + "min_tokens", "send no more", {"max_tokens": 4, "min_tokens": 5}),
        (stop + "stop_strings", "at most 16", {"stop": ["x"] * 17}),
        (stop + "stop_strings[0]", "1 to 256", {"stop": [""]}),
        (stop + "stop_strings[1]", "1 to 256", {"stop": ["x", "x" * 257]}),
        ("spec.num_logprobs", "0 to 20", {"logprobs": 21}),
        ("spec.num_choices", "1 to 32", {"n": 0}),
        ("spec.num_choices", "1 to 32", {"n": 1_000_000}),
    ]
    return [
        BadRequest(f"{field} {options}", InvalidArgument, says, field, "hello", options)
        for field, says, options in cases
    ]


def check_refused(client: Client, bad: BadRequest) -> None:
    """Sends it; status, field and message must be right."""
    try:
        answer = client.generate(bad.prompt, timeout=CALL_TIMEOUT_S, **bad.options)
    except SPS2Error as error:
        assert type(error) is bad.error, f"{bad.name}: {error!r}"
        named = [violation.field for violation in error.field_violations]
        assert named == ([bad.names] if bad.names else []), f"{bad.name}: {named}"
        assert re.search(bad.says, error.message), f"{bad.name}: {error.message}"
    else:
        raise AssertionError(f"{bad.name} was served: {answer}")


def malformed_messages() -> dict[str, bytes]:
    """Bytes that are no StreamGenerateTextRequest, by what is wrong with them."""
    spec = generation_pb2.GenerationSpec(text="héllo")
    whole = inference_service_pb2.StreamGenerateTextRequest(spec=spec).SerializeToString()
    return {
        "noise": b"\xff" * 24,
        "truncated": whole[:-2],
        "text is no UTF-8": whole.replace("é".encode(), b"\xc3\x28"),
        "endless nesting": b"\x0b" * 200,  # starts a group within a group within ...
    }


def check_malformed(address: str, method: str, raw: bytes, *, request_stream: bool = False) -> None:
    """Sends bytes past all of our own code; they must come back as INVALID_ARGUMENT with what to check."""
    with grpc.insecure_channel(address) as channel:
        call: Any  # grpc-stubs has no calls without serializers
        if request_stream:
            call = channel.stream_stream(method, bytes, bytes)(iter([raw]), timeout=CALL_TIMEOUT_S)
        else:
            call = channel.unary_stream(method, bytes, bytes)(raw, timeout=CALL_TIMEOUT_S)
        try:
            answers = list(call)
        except grpc.RpcError:
            code, details = call.code(), call.details()
        else:
            raise AssertionError(f"{method} answered {raw!r} with {answers!r}")
    assert code is grpc.StatusCode.INVALID_ARGUMENT, f"{method}: {code} {details}"
    assert re.search(MALFORMED_SAYS, details), details


def check_all_refused(running: LocalDeployment) -> int:
    """Everything above against a deployment, the ranks' own endpoints included, and that it goes on serving.

    Returns:
        How many requests were refused.
    """
    with running.client() as client:
        question: GenerationOptions = {"token_ids": [5, 6, 7], "max_tokens": 8, "ignore_eos": True}
        before = client.generate(timeout=CALL_TIMEOUT_S, **question).token_ids
        requests = bad_requests(client.list_models()[0])
        for bad in requests:
            check_refused(client, bad)
        messages = malformed_messages().values()
        for raw in messages:
            check_malformed(running.address, STREAM_METHOD, raw)
        leaders = [worker for worker in client.cluster_state().workers if worker.rank == 0]
        for leader in leaders:
            method = LEADER_METHODS[leader.role]
            check_malformed(leader.grpc_address, method, b"\xff" * 24, request_stream=leader.role == "decode")
        assert client.generate(timeout=CALL_TIMEOUT_S, **question).token_ids == before
    ended = [line for line in running.process.lines if line.startswith('{"event": "exited"')]
    assert not ended, ended
    return len(requests) + len(messages) + len(leaders)


def drop_tensor(folder: Path, name: str) -> None:
    """Rewrites a checkpoint of one safetensors file without one of its tensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})


def check_start_refused(folder: Path, says: Sequence[str], arguments: Sequence[str] = ()) -> float:
    """`sps2 up` with this folder says why in one line on stderr and exits with 1, soon and with nothing left.

    Args:
        folder: the checkpoint.
        says: words that the line must have.
        arguments: further flags.

    Returns:
        Seconds that it took.
    """
    command = [*SPS2, "up", "--quiet", "--listen", "127.0.0.1:0", "--model", str(folder)]
    started = time.monotonic()
    with ManagedProcess([*command, *arguments], name="sps2 up, refused") as process:
        code = process.wait(REFUSAL_TIMEOUT_S)
        seconds = time.monotonic() - started
        told = [line for line in process.lines if line.startswith("sps2 up: ") and "ranks ready" not in line]
        assert code == 1, f"exit code {code}\n{process.output}"
        reasons = [line for line in told if all(word in line for word in says)]
        assert len(reasons) == 1, process.output
        assert "Traceback" not in process.output, process.output
        return seconds
