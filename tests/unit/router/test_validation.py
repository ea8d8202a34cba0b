"""Validation without gRPC: defaults, limits at their edges, and what each message says."""

import pytest

from sps2.v1 import generation_pb2
from sps2_layout.profiles import DEFAULT
from sps2_router.types import Request, ServedModel, TokenChoice
from sps2_router.validation import (
    DEFAULT_MAX_TOKENS,
    check_fields,
    check_model,
    check_text_length,
    resolve,
)
from sps2_service.errors import InvalidArgument, NotFound, OutOfRange, ServiceError
from sps2_service.request_fields import check_request_id

MODEL = ServedModel("tiny", "hash", 1000, 300, (1, 2))
Spec, Sampling, Stop = generation_pb2.GenerationSpec, generation_pb2.SamplingSpec, generation_pb2.StopSpec


def resolved(spec: generation_pb2.GenerationSpec, num_prompt_tokens: int = 3) -> Request:
    return resolve(spec, "r", [5] * num_prompt_tokens, MODEL, 99, DEFAULT)


def test_what_is_unset_gets_its_default() -> None:
    assert resolved(Spec(text="x")).choice == TokenChoice(
        temperature=0.0,
        top_p=1.0,
        top_k=-1,
        seed=99,
        stop_token_ids=(1, 2),
        max_tokens=DEFAULT_MAX_TOKENS,
    )


def test_what_is_set_stays() -> None:
    spec = Spec(
        text="x",
        sampling=Sampling(temperature=0.5, top_p=0.25, top_k=40, seed=0),
        stop=Stop(max_tokens=7, stop_token_ids=[2, 9, 9], ignore_eos=True),
    )
    assert resolved(spec).choice == TokenChoice(0.5, 0.25, 40, 0, (2, 9), 7)


def test_the_whole_choice() -> None:
    spec = Spec(
        text="x",
        sampling=Sampling(
            min_p=0.5,
            repetition_penalty=1.5,
            presence_penalty=-1,
            frequency_penalty=2,
            logit_bias={7: -100},
            first_choice=2,
        ),
        stop=Stop(stop_strings=["b", "a", "b"], min_tokens=4),
        num_logprobs=0,
        num_choices=3,
    )
    assert resolved(spec).choice == TokenChoice(
        *(0.0, 1.0, -1, 99, (1, 2), DEFAULT_MAX_TOKENS),
        min_p=0.5,
        repetition_penalty=1.5,
        presence_penalty=-1,
        frequency_penalty=2,
        logit_bias={7: -100},
        min_tokens=4,
        stop_strings=("b", "a"),
        num_logprobs=0,
        num_choices=3,
        first_choice=2,
    )


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("field", "says", "spec"),
    [
        ("spec.sampling.min_p", "from 0 to 1", Spec(text="x", sampling=Sampling(min_p=1.01))),
        ("spec.sampling.min_p", "from 0 to 1", Spec(text="x", sampling=Sampling(min_p=NAN))),
        (
            "spec.sampling.repetition_penalty",
            "from 0.01 to 100",
            Spec(text="x", sampling=Sampling(repetition_penalty=0)),
        ),
        (
            "spec.sampling.repetition_penalty",
            "from 0.01 to 100",
            Spec(text="x", sampling=Sampling(repetition_penalty=INF)),
        ),
        (
            "spec.sampling.presence_penalty",
            "from -2 to 2",
            Spec(text="x", sampling=Sampling(presence_penalty=2.1)),
        ),
        (
            "spec.sampling.frequency_penalty",
            "from -2 to 2",
            Spec(text="x", sampling=Sampling(frequency_penalty=-3)),
        ),
        (
            "spec.sampling.logit_bias[300]",
            "ids from 0 to 299",
            Spec(text="x", sampling=Sampling(logit_bias={300: 1})),
        ),
        (
            "spec.sampling.logit_bias[-1]",
            "ids from 0 to 299",
            Spec(text="x", sampling=Sampling(logit_bias={-1: 1})),
        ),
        (
            "spec.sampling.logit_bias[5]",
            "from -100 to 100",
            Spec(text="x", sampling=Sampling(logit_bias={5: 101})),
        ),
        (
            "spec.sampling.logit_bias[5]",
            "from -100 to 100",
            Spec(text="x", sampling=Sampling(logit_bias={5: NAN})),
        ),
        (
            "spec.sampling.logit_bias",
            "at most 1024",
            Spec(text="x", sampling=Sampling(logit_bias=dict.fromkeys(range(1025), 0.0))),
        ),
        ("spec.sampling.first_choice", "0 or more", Spec(text="x", sampling=Sampling(first_choice=-1))),
        ("spec.priority", "-10 to 10", Spec(text="x", priority=11)),
        ("spec.priority", "-10 to 10", Spec(text="x", priority=-11)),
        ("spec.stop.min_tokens", "0 or more", Spec(text="x", stop=Stop(min_tokens=-1))),
        ("spec.stop.stop_strings", "at most 16", Spec(text="x", stop=Stop(stop_strings=["x"] * 17))),
        ("spec.stop.stop_strings[1]", "1 to 256", Spec(text="x", stop=Stop(stop_strings=["x", ""]))),
        ("spec.stop.stop_strings[0]", "1 to 256", Spec(text="x", stop=Stop(stop_strings=["€" * 86]))),
        ("spec.num_logprobs", "0 to 20", Spec(text="x", num_logprobs=21)),
        ("spec.num_logprobs", "0 to 20", Spec(text="x", num_logprobs=-1)),
        ("spec.num_choices", "1 to 32", Spec(text="x", num_choices=0)),
        ("spec.num_choices", "1 to 32", Spec(text="x", num_choices=2**31 - 1)),
    ],
)
def test_a_choice_out_of_range_is_named(field: str, says: str, spec: generation_pb2.GenerationSpec) -> None:
    with pytest.raises(InvalidArgument, match=says) as caught:
        check_fields(spec, MODEL)
    assert [one.field for one in caught.value.violations] == [field]


def test_min_tokens_above_max_tokens() -> None:
    with pytest.raises(InvalidArgument, match="max_tokens is 5") as caught:
        resolved(Spec(text="x", stop=Stop(max_tokens=5, min_tokens=6)))
    assert caught.value.violations[0].field == "spec.stop.min_tokens"


@pytest.mark.parametrize(("num_prompt_tokens", "max_tokens"), [(1, 256), (744, 256), (745, 255), (999, 1)])
def test_unset_max_tokens_is_cut_to_the_context(num_prompt_tokens: int, max_tokens: int) -> None:
    assert resolved(Spec(text="x"), num_prompt_tokens).choice.max_tokens == max_tokens


def test_the_context_may_be_filled_to_the_last_token() -> None:
    spec = Spec(text="x", stop=Stop(max_tokens=100))
    assert resolved(spec, 900).choice.max_tokens == 100
    with pytest.raises(OutOfRange, match="has room for 99"):
        resolved(spec, 901)
    with pytest.raises(OutOfRange, match="shorten it"):
        resolved(Spec(text="x"), 1000)


def test_a_text_without_tokens() -> None:
    with pytest.raises(InvalidArgument, match="has no tokens"):
        resolve(Spec(text="x"), "r", [], MODEL, 0, DEFAULT)


@pytest.mark.parametrize(
    "spec",
    [
        Spec(text="x", request_id="x" * 64, nonce=b"n" * 32, model="tiny"),
        Spec(text="x", request_id="a b~!"),
        Spec(token_ids=generation_pb2.TokenIds(ids=[0, 299])),
        Spec(text="x", sampling=Sampling(temperature=0, top_p=1, top_k=-1)),
        Spec(text="x", sampling=Sampling(temperature=1e6, top_p=1e-6, top_k=0)),
        Spec(text="x", stop=Stop(max_tokens=1, stop_token_ids=[299] * 64)),
        Spec(text="x", sampling=Sampling(min_p=0, repetition_penalty=0.01, presence_penalty=-2)),
        Spec(text="x", sampling=Sampling(min_p=1, repetition_penalty=100, frequency_penalty=2)),
        Spec(text="x", sampling=Sampling(logit_bias={0: -100, 299: 100}, first_choice=2**31 - 1)),
        Spec(text="x", sampling=Sampling(logit_bias=dict.fromkeys(range(300), 1.0))),
        Spec(text="x", stop=Stop(stop_strings=["€" * 85 + "x"] * 16, min_tokens=0)),
        Spec(text="x", num_logprobs=0, num_choices=1),
        Spec(text="x", num_logprobs=20, num_choices=32),
    ],
)
def test_values_at_the_edge_are_fine(spec: generation_pb2.GenerationSpec) -> None:
    check_fields(spec, MODEL)


def test_the_attention_profile_of_a_request_goes_before_the_deployments() -> None:
    long = ServedModel("tiny", "hash", 100_000, 300, ())
    spec = Spec(text="x")
    said = {}
    for spec.attention_profile in ("", "exact", "paper", "default"):
        check_fields(spec, long)
        request = resolve(spec, "r", [5] * 20_000, long, 0, DEFAULT)
        assert request.attention.num_tokens == 20_000
        said[spec.attention_profile] = request.attention_profile
    assert said == {
        "": "default: N=4 A=5000 levels (1,1),(4,8) sampled tail 64 sinks 0",
        "exact": "exact",
        "paper": "paper: N=4 A=5000 levels (1,1),(4,8) sampled tail 0 sinks 0",
        "default": said[""],
    }


def test_unknown_attention_profiles_are_named() -> None:
    with pytest.raises(InvalidArgument, match="send one of exact, paper, default") as caught:
        check_fields(Spec(text="x", attention_profile="dense"), MODEL)
    assert caught.value.violations[0].field == "spec.attention_profile"


def test_one_wrong_id_among_many_is_found() -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_fields(Spec(token_ids=generation_pb2.TokenIds(ids=[*range(300), 300])), MODEL)
    assert caught.value.violations[0].field == "spec.token_ids.ids[300]"
    assert "from 0 to 299" in caught.value.message


def test_more_ids_than_the_context_are_counted_only() -> None:
    with pytest.raises(OutOfRange):
        check_fields(Spec(token_ids=generation_pb2.TokenIds(ids=[-1] * 1000)), MODEL)


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized() -> None:
    check_text_length(8000, 8, MODEL, "spec.text")
    with pytest.raises(OutOfRange, match="8001 characters"):
        check_text_length(8001, 8, MODEL, "spec.text")


@pytest.mark.parametrize("request_id", ["", "x" * 65, "tab\t", "\x00", "\x7f", "ü", "a\u2028b"])
def test_request_ids_that_are_none(request_id: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_request_id(request_id, "request_id")
    assert caught.value.violations[0].field == "request_id"


def test_unknown_models_are_echoed_safely() -> None:
    check_model("", MODEL)
    with pytest.raises(NotFound) as caught:
        check_model("é" * 5000, MODEL)
    assert len(caught.value.message) < 300
    assert caught.value.message.isascii()


def test_errors_carry_no_prompt() -> None:
    canary = "canary-prompt"
    for spec in (
        Spec(text=canary, request_id="x" * 65),
        Spec(text=canary, sampling=Sampling(top_p=2)),
        Spec(text=canary, model="other"),
    ):
        with pytest.raises(ServiceError) as caught:
            check_fields(spec, MODEL)
        assert canary not in str(caught.value)
