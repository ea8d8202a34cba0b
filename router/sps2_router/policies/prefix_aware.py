"""The default policy: the prefill group that has least to compute before the prompt is done, cached KV counted."""

from collections.abc import Mapping, Sequence

from sps2_router.policies.base import NO_LOAD, Ask, GroupLoad, Policy
from sps2_router.policies.least_loaded import LeastLoaded
from sps2_router.types import Group, GroupPair


class PrefixAware(Policy):
    """Of the groups for which a prompt costs least, the pair that `LeastLoaded` would take.

    A prompt costs a group the tokens that wait or run there, by this router's count or the leader's last report,
    whichever is more, and those of its own that are not cached there; what another group has cached counts as much as
    it costs to fetch, by the leader's word. So the holder of its beginning is preferred unless its queue is longer than
    what fetching or computing the beginning elsewhere would add. Where nothing is cached for a prompt, it is
    `LeastLoaded`.
    """

    def __init__(self) -> None:
        self._among_equals = LeastLoaded()

    def pick(
        self, ask: Ask, prefill: Sequence[Group], decode: Sequence[Group], loads: Mapping[str, GroupLoad]
    ) -> GroupPair | None:
        """See Policy."""
        if any(group.name in ask.cached for group in prefill):
            costs = {group.name: _cost(group, ask, loads) for group in prefill}
            for cost in sorted(set(costs.values())):
                cheapest = [group for group in prefill if costs[group.name] == cost]
                if (pair := self._among_equals.pick(ask, cheapest, decode, loads)) is not None:
                    return pair
            return None
        return self._among_equals.pick(ask, prefill, decode, loads)


def _cost(group: Group, ask: Ask, loads: Mapping[str, GroupLoad]) -> float:
    """Tokens that the group computes until it has computed this prompt; those that it fetches count as less."""
    reported = group.leader.load.queued_tokens if group.leader is not None else 0
    queued = max(loads.get(group.name, NO_LOAD).num_prompt_tokens, reported)
    own = ask.cached.get(group.name, 0)
    fetched = max(ask.cached.values()) - own
    return queued + ask.num_tokens - own - fetched * (1 - group.fetched_token_cost)
