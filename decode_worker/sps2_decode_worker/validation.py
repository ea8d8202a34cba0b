"""What the messages of a Decode call must be before the leader acts on them. Pure; InvalidArgument names the field."""

from sps2.internal.v1 import decode_service_pb2
from sps2_service.errors import InvalidArgument
from sps2_service.ranks.leader_requests import check_attempt, check_token_choice
from sps2_service.request_fields import Vocabulary
from sps2_service.turns import MAX_PRIORITY


def check_reserve(reserve: decode_service_pb2.ReserveKv, vocabulary: Vocabulary) -> None:
    """The first message. Whether the group has such room, and this model, is for the coordinator to see.

    Raises:
        InvalidArgument: names the field.
    """
    check_attempt("reserve.attempt", reserve.attempt)
    if reserve.num_prompt_tokens < 1:
        raise InvalidArgument.of_field(
            "reserve.num_prompt_tokens", f"is {reserve.num_prompt_tokens}; a prompt has at least one token"
        )
    check_token_choice("reserve.choice", reserve.choice, vocabulary)
    if abs(reserve.priority) > MAX_PRIORITY:
        raise InvalidArgument.of_field(
            "reserve.priority", f"is {reserve.priority}; send {-MAX_PRIORITY} to {MAX_PRIORITY}"
        )
    if reserve.asked_at_us < 0:
        raise InvalidArgument.of_field("reserve.asked_at_us", f"is {reserve.asked_at_us}; send 0 or more")


def check_start(start: decode_service_pb2.StartDecode, num_choices: int, vocabulary: Vocabulary) -> None:
    """The second message.

    Raises:
        InvalidArgument: names the field.
    """
    vocabulary.check_one("start.first_token_id", start.first_token_id)
    vocabulary.check("start.more_first_token_ids", start.more_first_token_ids)
    for index, choice in enumerate(start.finished_choices):
        if not 0 <= choice < num_choices:
            raise InvalidArgument.of_field(
                f"start.finished_choices[{index}]", f"is {choice} of {num_choices} choices"
            )
    if len(set(start.finished_choices)) == num_choices:
        raise InvalidArgument.of_field(
            "start.finished_choices", "names all choices: nothing is left to decode"
        )
