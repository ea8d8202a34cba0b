"""Messages to the workers, packed from the router's nouns. Pure."""

from sps2.internal.v1 import decode_service_pb2, placement_pb2, prefill_service_pb2
from sps2.v1 import generation_pb2
from sps2_layout.block_hash import BLOCK_TOKENS
from sps2_layout.wire import pack_attention
from sps2_router.types import GroupPair, Request, Reuse

MAX_PREFIX_SOURCES = 4
"""A prefill group asks one or two of them."""


def pack_choice(request: Request) -> prefill_service_pb2.TokenChoice:
    """The choice with every field set, so that no worker needs defaults."""
    choice = request.choice
    penalizes_prompt = choice.repetition_penalty != 1
    return prefill_service_pb2.TokenChoice(
        sampling=generation_pb2.SamplingSpec(
            temperature=choice.temperature,
            top_p=choice.top_p,
            top_k=choice.top_k,
            seed=choice.seed,
            min_p=choice.min_p,
            repetition_penalty=choice.repetition_penalty,
            presence_penalty=choice.presence_penalty,
            frequency_penalty=choice.frequency_penalty,
            logit_bias=choice.logit_bias,
            first_choice=choice.first_choice,
        ),
        stop_token_ids=choice.stop_token_ids,
        max_tokens=choice.max_tokens,
        min_tokens=choice.min_tokens,
        num_logprobs=choice.num_logprobs,
        num_choices=choice.num_choices,
        prompt_token_ids=sorted(set(request.prompt_ids)) if penalizes_prompt else (),
        generated_token_ids=request.generated_ids,
    )


def pack_reserve(
    request: Request, attempt: placement_pb2.Attempt, pair: GroupPair, asked_at_us: int
) -> decode_service_pb2.DecodeRequest:
    """The first message of a decode call; for `asked_at_us` see ReserveKv."""
    return decode_service_pb2.DecodeRequest(
        reserve=decode_service_pb2.ReserveKv(
            attempt=attempt,
            num_prompt_tokens=request.num_tokens,
            choice=pack_choice(request),
            model_hash=pair.prefill_leader.capabilities.model_hash,
            prefill_group=pair.prefill.name,
            attention=pack_attention(request.attention),
            asked_at_us=asked_at_us,
            priority=request.priority,
            block_hashes=request.block_hashes,
        )
    )


def pack_start(first: prefill_service_pb2.FirstToken) -> decode_service_pb2.DecodeRequest:
    """The second message of a decode call."""
    choices = [first, *first.more_choices]
    start = decode_service_pb2.StartDecode(
        first_token_id=first.token_id,
        more_first_token_ids=[one.token_id for one in first.more_choices],
        finished_choices=[index for index, one in enumerate(choices) if one.finish_reason],
    )
    return decode_service_pb2.DecodeRequest(start=start)


def pack_stop(choice_index: int) -> decode_service_pb2.DecodeRequest:
    """Ends one choice of several."""
    return decode_service_pb2.DecodeRequest(stop=decode_service_pb2.StopChoice(choice_index=choice_index))


def pack_prefill(
    request: Request, attempt: placement_pb2.Attempt, placement: placement_pb2.Placement, group: str
) -> prefill_service_pb2.PrefillRequest:
    """The request of a prefill call to that group."""
    return prefill_service_pb2.PrefillRequest(
        attempt=attempt,
        token_ids=request.token_ids,
        placement=placement,
        choice=pack_choice(request),
        attention=pack_attention(request.attention),
        block_hashes=() if request.reuse is Reuse.OFF else request.block_hashes,
        prefix_sources=_prefix_sources(request, group),
    )


def _prefix_sources(request: Request, group: str) -> list[prefill_service_pb2.PrefixSource]:
    """Who holds more of the prompt's beginning than that group, the longest first."""
    own = request.cached.get(group, 0)
    longer = sorted(((tokens, name) for name, tokens in request.cached.items() if tokens > own), reverse=True)
    return [
        prefill_service_pb2.PrefixSource(
            group=name, leader_address=request.holders[name], num_tokens=tokens // BLOCK_TOKENS * BLOCK_TOKENS
        )
        for tokens, name in longer[:MAX_PREFIX_SOURCES]
        if request.holders.get(name)
    ]
