"""Messages to the workers, packed from the router's nouns. Pure."""

from sps2.internal.v1 import decode_service_pb2, placement_pb2, prefill_service_pb2
from sps2.v1 import generation_pb2
from sps2_layout.wire import pack_attention
from sps2_router.types import GroupPair, Request, TokenChoice


def pack_choice(choice: TokenChoice) -> prefill_service_pb2.TokenChoice:
    """The choice with every field set, so that no worker needs defaults."""
    return prefill_service_pb2.TokenChoice(
        sampling=generation_pb2.SamplingSpec(
            temperature=choice.temperature, top_p=choice.top_p, top_k=choice.top_k, seed=choice.seed
        ),
        stop_token_ids=choice.stop_token_ids,
        max_tokens=choice.max_tokens,
    )


def pack_reserve(
    request: Request, attempt: placement_pb2.Attempt, pair: GroupPair
) -> decode_service_pb2.DecodeRequest:
    """The first message of a decode call."""
    return decode_service_pb2.DecodeRequest(
        reserve=decode_service_pb2.ReserveKv(
            attempt=attempt,
            num_prompt_tokens=request.num_prompt_tokens,
            choice=pack_choice(request.choice),
            model_hash=pair.prefill_leader.capabilities.model_hash,
            prefill_group=pair.prefill.name,
            attention=pack_attention(request.attention),
        )
    )


def pack_start(first_token_id: int) -> decode_service_pb2.DecodeRequest:
    """The second message of a decode call."""
    return decode_service_pb2.DecodeRequest(
        start=decode_service_pb2.StartDecode(first_token_id=first_token_id)
    )


def pack_prefill(
    request: Request, attempt: placement_pb2.Attempt, placement: placement_pb2.Placement
) -> prefill_service_pb2.PrefillRequest:
    """The request of a prefill call."""
    return prefill_service_pb2.PrefillRequest(
        attempt=attempt,
        token_ids=request.prompt_ids,
        placement=placement,
        choice=pack_choice(request.choice),
        attention=pack_attention(request.attention),
    )
