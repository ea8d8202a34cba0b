"""The groups with the fewest requests, whatever they have cached."""

from collections.abc import Mapping, Sequence

from sps2_router.policies.base import NO_LOAD, Ask, GroupLoad, Policy, matching_pairs
from sps2_router.types import Group, GroupPair


class LeastLoaded(Policy):
    """Of all pairs that match, the one with the least loaded prefill group, then decode group.

    A group's load is the larger of two counts of requests: this router's own, exact but blind to others',
    and the leader's last report, which sees all but lags. Ties go to fewer tokens (prompt tokens waiting for
    prefill, KV blocks in use for decode), then to the one that was used least recently: one that has just come goes
    first. The name comes last, so that the choice is reproducible.
    """

    def pick(
        self, _: Ask, prefill: Sequence[Group], decode: Sequence[Group], loads: Mapping[str, GroupLoad]
    ) -> GroupPair | None:
        """See Policy."""
        return min(
            matching_pairs(prefill, decode),
            key=lambda pair: (_load(pair.prefill, loads), _load(pair.decode, loads)),
            default=None,
        )


def _load(group: Group, loads: Mapping[str, GroupLoad]) -> tuple[int, int, int, str]:
    own = loads.get(group.name, NO_LOAD)
    assert group.leader is not None  # it matched
    reported = group.leader.load
    num_requests = max(own.num_requests, reported.num_requests_running + reported.num_requests_waiting)
    num_tokens = max(own.num_prompt_tokens, reported.queued_tokens)
    return num_requests, num_tokens + reported.kv_blocks_used, own.last_seat, group.name
