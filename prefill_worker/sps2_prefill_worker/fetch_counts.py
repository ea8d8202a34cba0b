"""What came of the fetches of a prefill group, since its leader started."""

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum


class FetchResult(StrEnum):
    """How one try to fetch a beginning from one group ended."""

    COMPLETE = "complete"
    """It is here."""
    REFUSED = "refused"
    """Its holder has evicted it, is busy, is gone or has failed."""
    NO_ROOM = "no_room"
    """There was no idle room for it here, or it was needed before all had come."""
    LATE = "late"
    """It took longer than it may."""
    GIVEN_UP = "given_up"
    """The prompt was cancelled meanwhile, or this group's epoch ended."""


@dataclass
class FetchCounts:
    """Counted by the leader of the group that asked."""

    results: Counter[FetchResult] = field(default_factory=Counter)
    """Tries that have ended."""
    num_tokens: int = 0
    """Of complete ones."""
    num_bytes: int = 0
    """That their holders have sent for them."""
