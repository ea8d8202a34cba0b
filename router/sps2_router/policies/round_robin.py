"""Groups in turns, whatever they have to do: for groups and requests that are all alike, and to compare with."""

from collections.abc import Mapping, Sequence

from sps2_router.policies.base import NO_LOAD, Ask, GroupLoad, Policy, matching_pairs
from sps2_router.types import Group, GroupPair


class RoundRobin(Policy):
    """Of all pairs that match, the one whose prefill group was used least recently, then whose decode group was.

    That is a round among the groups that there are, in which one that comes is next and one that goes leaves no gap.
    """

    def pick(
        self, _: Ask, prefill: Sequence[Group], decode: Sequence[Group], loads: Mapping[str, GroupLoad]
    ) -> GroupPair | None:
        """See Policy."""
        return min(
            matching_pairs(prefill, decode),
            key=lambda pair: (_last(pair.prefill, loads), _last(pair.decode, loads)),
            default=None,
        )


def _last(group: Group, loads: Mapping[str, GroupLoad]) -> tuple[int, str]:
    return loads.get(group.name, NO_LOAD).last_seat, group.name
