"""Which cached beginning a request goes on from, and under which attention: fixed here, once, at admission. Pure.

What the directory has found is a hint. The prefill group has the last word on what it really holds; what it does not
hold it computes, under the same attention and with the same tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from sps2_layout.attention import Attention
from sps2_layout.block_hash import BLOCK_TOKENS
from sps2_router.types import Request, Reuse


@dataclass(frozen=True)
class HeldPrefix:
    """What one prefill group holds of a prompt's beginning."""

    group: str
    num_tokens: int
    """Whole blocks."""
    attention: Attention
    """Under which its KV was made."""
    room: int
    """Tokens whose KV one of its ranks can hold."""
    leader_address: str = ""
    """host:port, at which it is asked to send what it holds."""


def with_reuse(request: Request, held: Iterable[HeldPrefix], keys_per_token: int) -> Request:
    """The request as it goes on: its attention, and how much of its prompt which group has cached.

    A prompt under a sparse mask takes over the longest beginning, with the mask that it was made under, if the rest as
    dense queries costs less than a prefill of its own. An exact one stays exact, and uses exact KV only.

    Args:
        request: as it was resolved, by its length alone.
        held: what is found of its beginning.
        keys_per_token: see `cost`.
    """
    if request.reuse is Reuse.OFF:
        return request
    most = (request.num_prompt_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS  # the last token is always computed
    usable = [replace(one, num_tokens=min(one.num_tokens, most)) for one in held]
    usable = [one for one in usable if one.num_tokens and _may_use(request, one)]
    if request.attention.layout is not None:
        own = cost(request.num_prompt_tokens, 0, _seen_at_least(request.attention), keys_per_token)
        worth = [one for one in usable if _rest_cost(request, one, keys_per_token) < own]
        best = max(worth, key=lambda one: (one.num_tokens, one.attention.layout is None), default=None)
        if best is not None:
            request = _adopt(request, best)
    cached = {
        one.group: tokens
        for one in sorted(usable, key=lambda one: one.num_tokens)
        if (tokens := request.attention.num_usable(one.attention, one.num_tokens))
    }
    leaders = {one.group: one.leader_address for one in usable if one.group in cached}
    return replace(request, cached=cached, holders=leaders)


def cost(num_tokens: int, num_cached: int, num_seen: int, keys_per_token: int) -> float:
    """What a prefill costs, in tokens.

    Args:
        num_tokens: of the prompt.
        num_cached: of them, those that are not computed.
        num_seen: keys that the others see, all together.
        keys_per_token: so many keys seen cost as much as what else a token costs.
    """
    return num_tokens - num_cached + num_seen / keys_per_token


def _may_use(request: Request, one: HeldPrefix) -> bool:
    """Whether its rule allows it, and the whole text has room on one rank if it must be computed there anew."""
    is_exact = one.attention.layout is None
    num_tokens = request.num_prompt_tokens + request.choice.max_tokens
    return is_exact or (request.reuse is Reuse.ADOPT and num_tokens <= one.room)


def _rest_cost(request: Request, one: HeldPrefix, keys_per_token: int) -> float:
    num_tokens, cached = request.num_prompt_tokens, one.num_tokens
    num_seen = num_tokens * (num_tokens + 1) // 2 - cached * (cached + 1) // 2
    return cost(num_tokens, cached, num_seen, keys_per_token)


def _seen_at_least(attention: Attention) -> int:
    """Keys that a prompt's tokens see in their own shards and from the tail; samples of other shards come on top."""
    layout = attention.layout
    assert layout is not None, "an exact prompt is not weighed"
    shards = (len(layout.shard(index)) for index in range(layout.num_shards))
    return sum(size * (size + 1) // 2 for size in shards) + len(layout.tail_span) * layout.tail_span.begin


def _adopt(request: Request, one: HeldPrefix) -> Request:
    if one.attention.layout is None:
        attention = Attention(request.num_prompt_tokens, request.num_prompt_tokens)
        return replace(request, attention=attention, attention_profile=attention.describe())
    attention = one.attention.adopting(one.num_tokens)
    profile = f"adopted: {attention.describe()} for {attention.num_prefilled} tokens, then dense"
    return replace(request, attention=attention, attention_profile=profile)
