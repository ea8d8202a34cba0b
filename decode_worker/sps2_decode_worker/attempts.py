"""What the leader of a decode group knows of an attempt: its rows, what the ranks said of them, its tokens."""

import asyncio
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise

from sps2.internal.v1 import decode_service_pb2, engine_pb2
from sps2_decode_worker.tenants import Row
from sps2_service.errors import ServiceError
from sps2_service.trace_context import Place, current_place


@dataclass(frozen=True)
class ChoiceToken:
    """A token, and the choice that it belongs to."""

    choice_index: int
    token: engine_pb2.RowToken


class Pace:
    """When an attempt's tokens came, by the leader's clock; it remembers the last few thousand."""

    def __init__(self) -> None:
        self.sequence = 0
        """Of the last step that made one."""
        self._times: deque[float] = deque(maxlen=4096)

    def note(self, sequence: int, now: float) -> None:
        """Its tokens of a step have come, at a time in seconds."""
        if sequence != self.sequence:
            self.sequence = sequence
            self._times.append(now)

    @property
    def last_at(self) -> float:
        """When the newest came; minus infinity before the first."""
        return self._times[-1] if self._times else float("-inf")

    def gaps(self, begin: float, end: float) -> list[float]:
        """Seconds between two tokens, the later of which came in (begin, end]."""
        return [later - time for time, later in pairwise(self._times) if begin < later <= end]

    def quantile(self, share: float) -> float:
        """The gap that this share of all is not longer than; 0 without gaps."""
        gaps = sorted(self.gaps(float("-inf"), float("inf")))
        return gaps[min(int(share * len(gaps)), len(gaps) - 1)] if gaps else 0.0


@dataclass(eq=False)
class LiveAttempt:
    """One attempt and the rows of its choices, as the leader sees it."""

    rows: list[Row]
    """One for each choice, in order."""
    reserve: engine_pb2.ReserveRow
    request: decode_service_pb2.ReserveKv
    reserved: set[int] = field(default_factory=set)
    """Ranks that have taken it up."""
    received: set[int] = field(default_factory=set)
    """Ranks whose part of the KV is complete and verified."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    first_token_ids: dict[int, int] = field(default_factory=dict)
    """By row, once admitted."""
    tokens: asyncio.Queue[ChoiceToken | ServiceError | None] = field(default_factory=asyncio.Queue)
    """None says that a choice was stopped."""
    failed: asyncio.Event = field(default_factory=asyncio.Event)
    error: ServiceError | None = None
    """Set with `failed`."""
    pace: Pace = field(default_factory=Pace)
    place: Place | None = field(default_factory=current_place.get)
    """The router's span, for those of the ranks."""
    resized_at: float = 0.0
    """End of its last resize, by the event loop's clock."""
    moved_with: int = 0
    """Sequence of the last plan with which blocks of it moved."""
    num_blocks_moved: int = 0
    record_timer: asyncio.TimerHandle | None = None
    """Records its shards again before the directory's lease on them ends; None before the commit."""

    @property
    def row(self) -> Row:
        """The first choice's: it takes the KV in, and its shards are those of all."""
        return self.rows[0]

    @property
    def holders(self) -> set[int]:
        """Ranks to which its KV is delivered; on a mesh the tensor ranks of each sequence index."""
        return {shard.rank for shard in self.reserve.placement.shards}

    @property
    def choices(self) -> dict[int, int]:
        """Index of the choice by row."""
        return {row.row_id: index for index, row in enumerate(self.rows)}

    @property
    def shards(self) -> list[tuple[int, int, int, int]]:
        """Tokens [begin, end) on each holder, as the scheduler numbers them: (holder, begin, end, blocks).

        All its blocks go with the first.
        """
        tenant = self.row.tenant
        num_tokens = tenant.places.num_tokens + self.row.num_planned - 1
        found = []
        for rank in tenant.spread.holders:
            num_blocks = tenant.held(rank)
            for begin, end in tenant.spread.tokens_on(rank, num_tokens):
                found.append((rank, begin, end, num_blocks))
                num_blocks = 0
        return found
