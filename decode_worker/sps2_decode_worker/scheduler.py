"""Which rows a decode group holds and when a step runs. Pure: no torch, no clock, no network.

Given the same events it makes the same plans. It counts blocks for every rank, so that a rank never runs out of
them; which blocks they are is each rank's own affair. Plans go out one step ahead of what has been computed.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from sps2_engine.attention.decode_plan import choose_holders, place_tokens

MAX_STEPS_IN_FLIGHT = 2
"""The step that computes and the one that waits behind it."""


class NoRoomError(Exception):
    """Not enough free blocks now."""


class NeverFitsError(Exception):
    """More blocks than the group has."""


class RowState(enum.Enum):
    """Where a row is in its life."""

    RESERVED = "reserved"
    """It has room; its KV is on the way."""
    ACTIVE = "active"
    """Each step makes a token for it."""
    RELEASED = "released"
    """It takes part in no further plan."""


@dataclass
class SharedPrompt:
    """Blocks that the rows of one attempt's choices share: those of its prompt into which no row appends."""

    blocks: dict[int, int]
    """By rank."""
    num_rows: int = 0
    """Rows that still hold them."""


@dataclass
class Row:
    """One choice of an attempt in the group."""

    row_id: int
    home: int
    shards: dict[int, tuple[int, int]]
    """Tokens [begin, end) of the prompt on each of its holders."""
    blocks: dict[int, int]
    """Blocks on each of them, the shared ones included."""
    shared: SharedPrompt
    max_tokens: int
    state: RowState = RowState.RESERVED
    num_planned: int = 1
    """Output tokens planned so far; the first is prefill's."""


@dataclass(frozen=True)
class Plan:
    """What every rank does next, in this order: release, reserve, admit, then (if `run`) one step."""

    sequence: int
    release: tuple[int, ...]
    reserve: tuple[int, ...]
    admit: tuple[int, ...]
    run: bool


@dataclass
class DecodeScheduler:
    """Rows, free blocks, and the plans that follow from them."""

    blocks_total: tuple[int, ...]
    """Blocks of each rank."""
    block_tokens: int
    min_holder_tokens: int
    """A prompt is spread over a further rank only while each would hold at least so many tokens."""
    rows: dict[int, Row] = field(default_factory=dict)
    free: list[int] = field(init=False)
    steps_in_flight: int = 0
    _next_row: int = 1
    _sequence: int = 0
    _reserve: list[int] = field(default_factory=list)
    _admit: list[int] = field(default_factory=list)
    _release: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free = list(self.blocks_total)

    def reserve(self, num_prompt_tokens: int, max_tokens: int, num_choices: int = 1) -> list[Row]:
        """Gives an attempt room for its prompt and all of its output: a row for each choice.

        Raises:
            NoRoomError: blocks are taken; later it may fit.
            NeverFitsError: the group is too small for it.
        """
        rows = self._place(num_prompt_tokens, max_tokens, num_choices, self.free)
        if rows is None:
            if self._place(num_prompt_tokens, max_tokens, num_choices, self.blocks_total) is None:
                raise NeverFitsError
            raise NoRoomError
        self._next_row += num_choices
        for row in rows:
            self._take_blocks(row)
            self.rows[row.row_id] = row
            self._reserve.append(row.row_id)
        return rows

    def admit(self, row_id: int) -> None:
        """The row's KV is complete and its first token known: it decodes from the next step on."""
        row = self.rows[row_id]
        row.state = RowState.ACTIVE
        self._admit.append(row_id)

    def release(self, row_id: int) -> None:
        """The row leaves, finished or not; again is no news."""
        row = self.rows.get(row_id)
        if row is None or row.state is RowState.RELEASED:
            return
        row.state = RowState.RELEASED
        self._release.append(row_id)

    def step_done(self) -> None:
        """Every rank has reported a step."""
        self.steps_in_flight -= 1

    def next_plan(self) -> Plan | None:
        """The plan to send now, or None when there is nothing to say or two steps are under way."""
        active = [row for row in self.rows.values() if row.state is RowState.ACTIVE]
        run = bool(active) and self.steps_in_flight < MAX_STEPS_IN_FLIGHT
        if not (run or self._reserve or self._admit or self._release):
            return None
        self._sequence += 1
        plan = Plan(self._sequence, tuple(self._release), tuple(self._reserve), tuple(self._admit), run)
        # Commands are executed in order, so what a plan releases may be reserved again by the next.
        for row_id in self._release:
            self._free_blocks(self.rows.pop(row_id))
        self._release, self._reserve, self._admit = [], [], []
        if run:
            self.steps_in_flight += 1
            self._count_tokens(active)
        return plan

    def num_rows(self, state: RowState) -> int:
        """Rows in that state."""
        return sum(row.state is state for row in self.rows.values())

    def _count_tokens(self, active: Sequence[Row]) -> None:
        """A row whose last token is planned leaves with the next plan, without waiting for that token."""
        for row in active:
            row.num_planned += 1
            if row.num_planned >= row.max_tokens:
                self.release(row.row_id)

    def _take_blocks(self, row: Row) -> None:
        for rank, count in row.blocks.items():
            self.free[rank] -= count - (row.shared.blocks[rank] if row.shared.num_rows else 0)
        row.shared.num_rows += 1

    def _free_blocks(self, row: Row) -> None:
        row.shared.num_rows -= 1
        for rank, count in row.blocks.items():
            self.free[rank] += count - (row.shared.blocks[rank] if row.shared.num_rows else 0)

    def _place(
        self, num_prompt_tokens: int, max_tokens: int, num_choices: int, free: Sequence[int]
    ) -> list[Row] | None:
        """Rows within `free` blocks, spread as wide as the prompt allows; None when they do not fit so."""
        ranges = place_tokens(num_prompt_tokens, self.block_tokens, len(free), self.min_holder_tokens)
        holders = choose_holders(free, len(ranges))
        shards = dict(zip(holders, ranges, strict=True))
        blocks = {rank: -(-(end - begin) // self.block_tokens) for rank, (begin, end) in shards.items()}
        home = self._choose_home(holders)
        num_at_home = shards[home][1] - shards[home][0]
        shared = blocks | {home: num_at_home // self.block_tokens}
        blocks[home] = -(-(num_at_home + max_tokens) // self.block_tokens)
        needed = {rank: shared[rank] + num_choices * (blocks[rank] - shared[rank]) for rank in holders}
        if any(count > free[rank] for rank, count in needed.items()):
            return None
        prompt = SharedPrompt(shared)
        row_ids = range(self._next_row, self._next_row + num_choices)
        return [Row(row_id, home, shards, dict(blocks), prompt, max_tokens) for row_id in row_ids]

    def _choose_home(self, holders: Sequence[int]) -> int:
        """The holder at which fewest rows live."""
        load = dict.fromkeys(holders, 0)
        for row in self.rows.values():
            if row.home in load:
                load[row.home] += 1
        return min(holders, key=lambda rank: (load[rank], rank))
