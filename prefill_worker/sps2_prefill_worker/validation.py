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
"""Of where an engine takes KV, by number."""
MAX_NAME_CHARS = 260
"""Of a leader's address, maybe by a full domain name."""
BLOCK_TOKENS = 64
MAX_BLOCKS = 1 << 14
"""Of a prompt: a million tokens."""


def check_prefill(request: prefill_service_pb2.PrefillRequest, vocabulary: Vocabulary) -> None:
    """Every number of it that an engine would take on trust.

    Raises:
        InvalidArgument: names the field.
    """
    check_attempt("attempt", request.attempt)
    vocabulary.check("token_ids", request.token_ids)
    check_token_choice("choice", request.choice, vocabulary)
    num_tokens = len(request.token_ids)
    _check_placement(request.placement, request.attempt, num_tokens)
    for index, source in enumerate(request.prefix_sources):
        field = f"prefix_sources[{index}]"
        if source.num_tokens < 0 or source.num_tokens % BLOCK_TOKENS:
            raise InvalidArgument.of_field(
                f"{field}.num_tokens", f"is {source.num_tokens}; send whole blocks"
            )
        _check_address(f"{field}.leader_address", source.leader_address, MAX_NAME_CHARS)


def check_send_prefix(request: prefill_service_pb2.SendPrefixRequest) -> None:
    """The same for what another group's leader asks.

    Raises:
        InvalidArgument: names the field.
    """
    check_attempt("attempt", request.attempt)
    if not 0 < len(request.block_hashes) <= MAX_BLOCKS:
        raise InvalidArgument.of_field(
            "block_hashes", f"has {len(request.block_hashes)}; send 1 to {MAX_BLOCKS}"
        )
    _check_placement(request.placement, request.attempt, len(request.block_hashes) * BLOCK_TOKENS)


def _check_placement(
    placement: placement_pb2.Placement, attempt: placement_pb2.Attempt, num_tokens: int
) -> None:
    for index, held in enumerate(placement.held):
        _check_part(f"placement.held[{index}]", held, num_tokens)
    for index, shard in enumerate(placement.shards):
        field = f"placement.shards[{index}]"
        _check_part(field, shard, num_tokens)
        if shard.fence.attempt != attempt:
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


def _check_address(field: str, address: str, max_chars: int = MAX_ADDRESS_CHARS) -> None:
    if not (0 < len(address) <= max_chars and address.isascii() and address.isprintable()):
        raise InvalidArgument.of_field(field, f"must be host:port, 1 to {max_chars} ASCII characters")
