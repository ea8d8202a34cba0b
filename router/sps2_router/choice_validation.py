"""What the fields of a spec that say how tokens are chosen must be, and the choice that they come to. Pure."""

from typing import NoReturn

from sps2.v1 import generation_pb2
from sps2_router.types import ServedModel, TokenChoice
from sps2_service.errors import InvalidArgument
from sps2_service.request_fields import check_num_choices, check_num_logprobs, check_sampling

MAX_STOP_TOKEN_IDS = 64
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_BYTES = 256


def check_choice(spec: generation_pb2.GenerationSpec, model: ServedModel) -> None:
    """Everything about how tokens are chosen but the ids of stop tokens.

    Raises:
        InvalidArgument: a field is wrong; names it.
    """
    check_sampling("spec.sampling", spec.sampling, model.vocabulary)
    _check_stop(spec.stop)
    if spec.HasField("num_logprobs"):
        check_num_logprobs("spec.num_logprobs", spec.num_logprobs)
    if spec.HasField("num_choices"):
        check_num_choices("spec.num_choices", spec.num_choices)


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
