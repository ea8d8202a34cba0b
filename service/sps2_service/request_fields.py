"""Fields that requests have at every door, clients' at the router and routers' at workers: what they may be. Pure.

Each function raises InvalidArgument that names the field; `field` is the path of what it is given.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from sps2.v1 import generation_pb2
from sps2_service.errors import InvalidArgument

MAX_REQUEST_ID_CHARS = 64
MAX_LOGIT_BIASES = 1024
MAX_LOGIT_BIAS = 100.0
MAX_LOGPROBS = 20
MAX_CHOICES = 32
RANGES = {
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
"""Fields of SamplingSpec with a closed range. The lower end of the repetition penalty keeps logits finite."""


@dataclass(frozen=True)
class Vocabulary:
    """Token ids of a model."""

    model_name: str
    """For people."""
    size: int
    """Ids are in [0, size)."""

    def check(self, field: str, ids: Sequence[int]) -> None:
        """Names the first id outside of it, as `field[index]`."""
        if ids and (min(ids) < 0 or max(ids) >= self.size):  # two passes in C, no loop in Python
            index = next(i for i, one in enumerate(ids) if not 0 <= one < self.size)
            self._refuse(f"{field}[{index}]", ids[index])

    def check_one(self, field: str, token_id: int) -> None:
        """The same for one id."""
        if not 0 <= token_id < self.size:
            self._refuse(field, token_id)

    def _refuse(self, field: str, token_id: int) -> None:
        last = self.size - 1
        raise InvalidArgument.of_field(
            field, f"is {token_id}; {self.model_name!r} has token ids from 0 to {last}"
        )


def check_request_id(request_id: str, field: str) -> None:
    """1 to 64 printable ASCII characters."""
    if not request_id:
        raise InvalidArgument.of_field(field, "is empty; name the request")
    if len(request_id) > MAX_REQUEST_ID_CHARS:
        raise InvalidArgument.of_field(
            field, f"is {len(request_id)} characters long; use at most {MAX_REQUEST_ID_CHARS}"
        )
    if not (request_id.isascii() and request_id.isprintable()):
        raise InvalidArgument.of_field(field, "holds control or non-ASCII characters; use printable ASCII")


def check_sampling(field: str, sampling: generation_pb2.SamplingSpec, vocabulary: Vocabulary) -> None:
    """What is set must be in its range; what is unset, means its default."""
    temperature, top_p, top_k = sampling.temperature, sampling.top_p, sampling.top_k
    if not (math.isfinite(temperature) and temperature >= 0):
        _refuse(f"{field}.temperature", f"is {temperature:g}; send a finite number >= 0 (0 is greedy)")
    if sampling.HasField("top_p") and not 0 < top_p <= 1:  # also refuses NaN
        _refuse(f"{field}.top_p", f"is {top_p:g}; send a number in (0, 1]")
    if top_k < -1:
        _refuse(f"{field}.top_k", f"is {top_k}; send -1 or 0 (off) or more")
    for name, (lowest, highest) in RANGES.items():
        value = getattr(sampling, name)
        # The wire's fp32 has no 0.01.
        if sampling.HasField(name) and not lowest <= round(value, 6) <= highest:  # type: ignore[arg-type]
            _refuse(f"{field}.{name}", f"is {value:g}; send a number from {lowest:g} to {highest:g}")
    if sampling.first_choice < 0:
        _refuse(f"{field}.first_choice", f"is {sampling.first_choice}; send 0 or more")
    _check_bias(f"{field}.logit_bias", sampling, vocabulary)


def check_num_logprobs(field: str, num_logprobs: int) -> None:
    """0 to 20."""
    if not 0 <= num_logprobs <= MAX_LOGPROBS:
        _refuse(field, f"is {num_logprobs}; send 0 to {MAX_LOGPROBS}")


def check_num_choices(field: str, num_choices: int) -> None:
    """1 to 32."""
    if not 1 <= num_choices <= MAX_CHOICES:
        _refuse(field, f"is {num_choices}; send 1 to {MAX_CHOICES}")


def _check_bias(field: str, sampling: generation_pb2.SamplingSpec, vocabulary: Vocabulary) -> None:
    if len(sampling.logit_bias) > MAX_LOGIT_BIASES:
        _refuse(field, f"has {len(sampling.logit_bias)} entries; send at most {MAX_LOGIT_BIASES}")
    for token_id, bias in sampling.logit_bias.items():
        vocabulary.check_one(f"{field}[{token_id}]", token_id)
        if not abs(bias) <= MAX_LOGIT_BIAS:  # also refuses NaN
            _refuse(f"{field}[{token_id}]", f"is {bias:g}; send a number from -100 to 100")


def _refuse(field: str, description: str) -> NoReturn:
    raise InvalidArgument.of_field(field, description)
