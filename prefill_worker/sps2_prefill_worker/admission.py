"""What a formed group must be able to do with a prompt before it takes it. Pure.

Knows the group's shape; that every number of a request is in its range `validation` has seen.
"""

from sps2.internal.v1 import placement_pb2, prefill_service_pb2
from sps2_engine.kv_transfer.relayout import check_covers
from sps2_layout.attention import Attention
from sps2_layout.block_hash import BLOCK_TOKENS
from sps2_layout.wire import unpack_attention
from sps2_prefill_worker.planning import PromptPlanner
from sps2_service.errors import FailedPrecondition, InvalidArgument


def check_placement(placement: placement_pb2.Placement, num_tokens: int, planner: PromptPlanner) -> None:
    """Every head of every token must go somewhere.

    Raises:
        InvalidArgument: it does not.
    """
    try:
        check_covers(placement, num_tokens, planner.model.num_kv_heads)
    except ValueError as error:
        raise InvalidArgument.of_field("placement", str(error)) from None


def attention_of(request: prefill_service_pb2.PrefillRequest) -> Attention:
    """The mask of a prompt.

    Raises:
        InvalidArgument: it is none, or does not fit the tokens.
    """
    try:
        attention = unpack_attention(request.attention)
    except ValueError as error:
        raise InvalidArgument.of_field("attention", str(error)) from None
    generated = request.choice.generated_token_ids
    num_prompt_tokens = len(request.token_ids) - len(generated)
    adopts = attention.layout is not None and attention.num_prefilled < num_prompt_tokens
    if attention.num_tokens != num_prompt_tokens and not adopts:
        raise InvalidArgument.of_field("attention", "the mask must be laid over the whole prompt")
    if attention.num_prefilled > num_prompt_tokens:
        raise InvalidArgument.of_field("attention", "more tokens have the mask than the prompt has")
    if len(request.block_hashes) * BLOCK_TOKENS > num_prompt_tokens:
        raise InvalidArgument.of_field("block_hashes", "there are more than the prompt has full blocks")
    if request.token_ids[num_prompt_tokens:] != generated:
        raise InvalidArgument.of_field("token_ids", "the tokens generated before must follow the prompt")
    return attention


def check_room(
    request: prefill_service_pb2.PrefillRequest, attention: Attention, planner: PromptPlanner, group: str
) -> None:
    """Takes only what has room when it comes back with all that it may have generated: then each resumption does.

    Raises:
        FailedPrecondition: it has not.
    """
    num_generated = len(request.choice.generated_token_ids)
    num_prompt_tokens = len(request.token_ids) - num_generated
    max_generated = max(num_generated, request.choice.max_tokens - 1)
    slice_tokens = planner.most_kept(attention, num_prompt_tokens + max_generated)
    kv_blocks = planner.costs.kv_blocks
    if -(-slice_tokens // BLOCK_TOKENS) > kv_blocks:
        raise FailedPrecondition(
            "PROMPT_TOO_LARGE",
            f"of {num_prompt_tokens} prompt tokens and up to {max_generated} generated ones, which follow "
            f"them when a stream is resumed, {slice_tokens} lie on one rank of {group}, which has KV "
            f"for {kv_blocks * BLOCK_TOKENS}: raise --kv-tokens, use more ranks or lower max_tokens",
        )
