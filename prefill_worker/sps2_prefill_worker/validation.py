"""What a PrefillRequest must be before the leader plans it. Pure; InvalidArgument names the field.

Knows the prompt's length and the model's vocabulary; that the placement takes every head of every token is for the
coordinator to see, which knows the model's heads.
"""

from sps2.internal.v1 import placement_pb2, prefill_service_pb2
from sps2_service.errors import InvalidArgument
from sps2_service.ranks.leader_requests import check_attempt, check_token_choice
from sps2_service.request_fields import Vocabulary

MAX_RANKS = 4096
"""Of any group."""
MAX_ADDRESS_CHARS = 128


def check_prefill(request: prefill_service_pb2.PrefillRequest, vocabulary: Vocabulary) -> None:
    """Every number of it that an engine would take on trust.

    Raises:
        InvalidArgument: names the field.
    """
    check_attempt("attempt", request.attempt)
    vocabulary.check("token_ids", request.token_ids)
    check_token_choice("choice", request.choice, vocabulary)
    num_tokens = len(request.token_ids)
    for index, held in enumerate(request.placement.held):
        _check_part(f"placement.held[{index}]", held, num_tokens)
    for index, shard in enumerate(request.placement.shards):
        field = f"placement.shards[{index}]"
        _check_part(field, shard, num_tokens)
        if shard.fence.attempt != request.attempt:
            raise InvalidArgument.of_field(f"{field}.fence.attempt", "is another attempt than this one")
        _check_address(f"{field}.transfer_address", shard.transfer_address)


def _check_part(
    field: str, part: placement_pb2.HeldTokens | placement_pb2.ShardPlacement, num_tokens: int
) -> None:
    if not 0 <= part.rank < MAX_RANKS:
        raise InvalidArgument.of_field(f"{field}.rank", f"is {part.rank}; no group has such a rank")
    if not 0 <= part.token_begin <= part.token_end <= num_tokens:
        raise InvalidArgument.of_field(
            f"{field}.token_begin",
            f"[{part.token_begin}, {part.token_end}) is no range of the {num_tokens} tokens that are sent",
        )


def _check_address(field: str, address: str) -> None:
    if not (0 < len(address) <= MAX_ADDRESS_CHARS and address.isascii() and address.isprintable()):
        raise InvalidArgument.of_field(field, f"must be host:port, 1 to {MAX_ADDRESS_CHARS} ASCII characters")
