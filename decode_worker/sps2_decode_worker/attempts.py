"""What the leader of a decode group knows of an attempt: its rows, what the ranks said of them, its tokens."""

import asyncio
from dataclasses import dataclass, field

from sps2.internal.v1 import decode_service_pb2, engine_pb2
from sps2_decode_worker.scheduler import Row
from sps2_service.errors import ServiceError


@dataclass(frozen=True)
class ChoiceToken:
    """A token, and the choice that it belongs to."""

    choice_index: int
    token: engine_pb2.RowToken


@dataclass(eq=False)
class LiveAttempt:
    """One attempt and the rows of its choices, as the leader sees it."""

    rows: list[Row]
    """One for each choice, in order."""
    reserve: engine_pb2.ReserveRow
    request: decode_service_pb2.ReserveKv
    reserved: set[int] = field(default_factory=set)
    """Holders that have taken it up."""
    received: set[int] = field(default_factory=set)
    """Holders whose part of the KV is complete and verified."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    first_token_ids: dict[int, int] = field(default_factory=dict)
    """By row, once admitted."""
    tokens: asyncio.Queue[ChoiceToken | ServiceError | None] = field(default_factory=asyncio.Queue)
    """None says that a choice was stopped."""
    failed: asyncio.Event = field(default_factory=asyncio.Event)
    error: ServiceError | None = None
    """Set with `failed`."""
    record_timer: asyncio.TimerHandle | None = None
    """Records its shards again before the directory's lease on them ends; None before the commit."""

    @property
    def row(self) -> Row:
        """The first choice's: it takes the KV in, and its shards are those of all."""
        return self.rows[0]

    @property
    def choices(self) -> dict[int, int]:
        """Index of the choice by row."""
        return {row.row_id: index for index, row in enumerate(self.rows)}
