"""What a group's leader checks of what a router asks, before any rank hears of it.

The router has checked its client's request already; this keeps a router of another release, or whoever else reaches
the port, from ending a group's epoch with a number that no engine can compute with. Pure.
"""

from sps2.internal.v1.placement_pb2 import Attempt
from sps2.internal.v1.prefill_service_pb2 import TokenChoice
from sps2_service.errors import InvalidArgument
from sps2_service.request_fields import (
    Vocabulary,
    check_num_choices,
    check_num_logprobs,
    check_request_id,
    check_sampling,
)


def check_attempt(field: str, attempt: Attempt) -> None:
    """A request id, and a number from 1.

    Raises:
        InvalidArgument: names the field.
    """
    check_request_id(attempt.request_id, f"{field}.request_id")
    if attempt.number < 1:
        raise InvalidArgument.of_field(f"{field}.number", f"is {attempt.number}; tries count from 1")


def check_token_choice(field: str, choice: TokenChoice, vocabulary: Vocabulary) -> None:
    """How tokens are chosen: every number in the range in which an engine computes.

    Raises:
        InvalidArgument: names the field.
    """
    check_sampling(f"{field}.sampling", choice.sampling, vocabulary)
    if not choice.sampling.HasField("top_p"):
        raise InvalidArgument.of_field(f"{field}.sampling.top_p", "is unset; a router sets every field")
    for name in ("stop_token_ids", "prompt_token_ids", "generated_token_ids"):
        vocabulary.check(f"{field}.{name}", getattr(choice, name))
    num_generated = len(choice.generated_token_ids)
    if choice.max_tokens <= num_generated:
        raise InvalidArgument.of_field(
            f"{field}.max_tokens", f"is {choice.max_tokens}; {num_generated} are generated: ask for more"
        )
    if not 0 <= choice.min_tokens <= choice.max_tokens:
        raise InvalidArgument.of_field(
            f"{field}.min_tokens", f"is {choice.min_tokens}; send 0 to {choice.max_tokens}"
        )
    if choice.HasField("num_logprobs"):
        check_num_logprobs(f"{field}.num_logprobs", choice.num_logprobs)
    check_num_choices(f"{field}.num_choices", choice.num_choices or 1)
