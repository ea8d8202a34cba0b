"""What the fields of a spec that say how tokens are chosen must be, and the choice that they come to. Pure."""

import math
from typing import NoReturn

from sps2.v1 import generation_pb2
from sps2_router.types import ServedModel, TokenChoice
from sps2_service.errors import InvalidArgument

MAX_STOP_TOKEN_IDS = 64
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_BYTES = 256
MAX_LOGIT_BIASES = 1024
MAX_LOGPROBS = 20
MAX_CHOICES = 32
RANGES = {
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
"""Fields of SamplingSpec with a closed range. The lower end of the repetition penalty keeps logits finite."""
MAX_LOGIT_BIAS = 100.0


def check_choice(spec: generation_pb2.GenerationSpec, model: ServedModel) -> None:
    """Everything about how tokens are chosen but the ids of stop tokens.

    Raises:
        InvalidArgument: a field is wrong; names it.
    """
    _check_sampling(spec.sampling)
    _check_bias(spec.sampling, model)
    _check_stop(spec.stop)
    if spec.HasField("num_logprobs") and not 0 <= spec.num_logprobs <= MAX_LOGPROBS:
        _refuse("spec.num_logprobs", f"is {spec.num_logprobs}; send 0 to {MAX_LOGPROBS}")
    if spec.HasField("num_choices") and not 1 <= spec.num_choices <= MAX_CHOICES:
        _refuse("spec.num_choices", f"is {spec.num_choices}; send 1 to {MAX_CHOICES}")


def _check_sampling(sampling: generation_pb2.SamplingSpec) -> None:
    temperature, top_p, top_k = sampling.temperature, sampling.top_p, sampling.top_k
    if not (math.isfinite(temperature) and temperature >= 0):
        _refuse("spec.sampling.temperature", f"is {temperature:g}; send a finite number >= 0 (0 is greedy)")
    if sampling.HasField("top_p") and not 0 < top_p <= 1:  # also refuses NaN
        _refuse("spec.sampling.top_p", f"is {top_p:g}; send a number in (0, 1]")
    if top_k < -1:
        _refuse("spec.sampling.top_k", f"is {top_k}; send -1 or 0 (off) or more")
    for name, (lowest, highest) in RANGES.items():
        value = getattr(sampling, name)
        # The wire's fp32 has no 0.01.
        if sampling.HasField(name) and not lowest <= round(value, 6) <= highest:  # type: ignore[arg-type]
            _refuse(f"spec.sampling.{name}", f"is {value:g}; send a number from {lowest:g} to {highest:g}")
    if sampling.first_choice < 0:
        _refuse("spec.sampling.first_choice", f"is {sampling.first_choice}; send 0 or more")


def _check_bias(sampling: generation_pb2.SamplingSpec, model: ServedModel) -> None:
    field = "spec.sampling.logit_bias"
    if len(sampling.logit_bias) > MAX_LOGIT_BIASES:
        _refuse(field, f"has {len(sampling.logit_bias)} entries; send at most {MAX_LOGIT_BIASES}")
    for token_id, bias in sampling.logit_bias.items():
        if not 0 <= token_id < model.vocabulary_size:
            _refuse(
                f"{field}[{token_id}]", f"{model.name!r} has token ids from 0 to {model.vocabulary_size - 1}"
            )
        if not abs(bias) <= MAX_LOGIT_BIAS:  # also refuses NaN
            _refuse(f"{field}[{token_id}]", f"is {bias:g}; send a number from -100 to 100")


def _check_stop(stop: generation_pb2.StopSpec) -> None:
    if stop.HasField("max_tokens") and stop.max_tokens <= 0:
        _refuse("spec.stop.max_tokens", f"is {stop.max_tokens}; send at least 1, or leave it unset")
    if stop.min_tokens < 0:
        _refuse("spec.stop.min_tokens", f"is {stop.min_tokens}; send 0 or more")
    if len(stop.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        _refuse(
            "spec.stop.stop_token_ids",
            f"has {len(stop.stop_token_ids)} ids; send at most {MAX_STOP_TOKEN_IDS}",
        )
    if len(stop.stop_strings) > MAX_STOP_STRINGS:
        _refuse(
            "spec.stop.stop_strings",
            f"has {len(stop.stop_strings)} strings; send at most {MAX_STOP_STRINGS}",
        )
    for index, text in enumerate(stop.stop_strings):
        num_bytes = len(text.encode())
        if not 1 <= num_bytes <= MAX_STOP_STRING_BYTES:
            _refuse(
                f"spec.stop.stop_strings[{index}]",
                f"is {num_bytes} bytes long; send 1 to {MAX_STOP_STRING_BYTES}",
            )


def resolve_choice(
    spec: generation_pb2.GenerationSpec, model: ServedModel, max_tokens: int, drawn_seed: int
) -> TokenChoice:
    """The choice that a checked spec asks for, with every default filled in.

    Raises:
        InvalidArgument: min_tokens is more than `max_tokens`, which fit the context.
    """
    sampling, stop = spec.sampling, spec.stop
    if stop.min_tokens > max_tokens:
        _refuse("spec.stop.min_tokens", f"is {stop.min_tokens}; max_tokens is {max_tokens}: send no more")
    eos = () if stop.ignore_eos else model.eos_token_ids
    return TokenChoice(
        temperature=sampling.temperature,
        top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
        top_k=sampling.top_k or -1,
        seed=sampling.seed if sampling.HasField("seed") else drawn_seed,
        stop_token_ids=tuple(dict.fromkeys((*eos, *stop.stop_token_ids))),
        max_tokens=max_tokens,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        min_tokens=stop.min_tokens,
        stop_strings=tuple(dict.fromkeys(stop.stop_strings)),
        num_logprobs=spec.num_logprobs if spec.HasField("num_logprobs") else None,
        num_choices=spec.num_choices or 1,
        first_choice=sampling.first_choice,
    )


def _refuse(field: str, description: str) -> NoReturn:
    raise InvalidArgument.of_field(field, description)
