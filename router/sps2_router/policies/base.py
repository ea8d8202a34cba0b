"""The interface of a routing policy.

The scheduler calls `pick` on the event loop, once for each attempt that has its turn, with candidates that
take requests right now. A policy is pure: same arguments, same answer; no clock, no network, nothing remembered.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from sps2_router.types import Group, GroupPair


@dataclass(frozen=True)
class Ask:
    """What is known of an attempt that asks for a place."""

    num_tokens: int
    """Tokens that prefill computes."""
    max_new_tokens: int = 0
    """Most tokens that decode draws after them, of all choices."""
    tenant: str = ""
    """Whose it is; empty where no tokens are asked for."""
    cached: Mapping[str, int] = field(default_factory=dict)
    """By prefill group: of them, those whose KV it is said to hold, so that it need not compute them."""
    is_short: bool = False
    """Whether prefill groups compute it while they compute long ones, in places of their own; see `Scheduler.sized`."""


@dataclass(frozen=True)
class GroupLoad:
    """What this router itself has running on a group: exact and immediate, unlike the group's own report."""

    num_requests: int = 0
    """Attempts that hold a place in the group."""
    num_prompt_tokens: int = 0
    """Their prompts' tokens."""
    last_seat: int = 0
    """Number of the last attempt that was given a place in it, counted by the router; 0: none was."""


NO_LOAD = GroupLoad()


class Policy(ABC):
    """Picks a pair of groups for a request."""

    @abstractmethod
    def pick(
        self, ask: Ask, prefill: Sequence[Group], decode: Sequence[Group], loads: Mapping[str, GroupLoad]
    ) -> GroupPair | None:
        """The pair to use, or None when no prefill candidate matches a decode candidate.

        Args:
            ask: What is to be placed.
            prefill: Ready prefill groups that have room.
            decode: Ready decode groups.
            loads: This router's own load by group name; groups without an entry have none.
        """


def matching_pairs(prefill: Sequence[Group], decode: Sequence[Group]) -> Iterator[GroupPair]:
    """Every pair of groups that can work together."""
    return (GroupPair(p, d) for p in prefill for d in decode if match(p, d))


def match(prefill: Group, decode: Group) -> bool:
    """Whether two groups can work together: the KV of one must be what the other expects."""
    if prefill.leader is None or decode.leader is None:
        return False
    mine, theirs = prefill.leader.capabilities, decode.leader.capabilities
    return mine.model_hash == theirs.model_hash and mine.dtype == theirs.dtype
