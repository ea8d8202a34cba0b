"""Which rows a decode group holds and when a step runs. Pure: no torch, no clock, no network.

Given the same events it makes the same plans. It counts blocks for every rank, so that a rank never runs out of
them; which blocks they are is each rank's own affair. Plans go out one step ahead of what has been computed.

An attempt gets room for its prompt and the beginning of its output; the rest is taken block by block. When a rank
runs out, the attempt that came last there is preempted: it leaves, and the router brings it back when there is
room. The one that came first is never preempted and, coming back, takes its room from later ones, so that each
ends in its turn.
"""

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from sps2_decode_worker.placing import BlockCounts, Places, place

MAX_STEPS_IN_FLIGHT = 2
"""The step that computes and the one that waits behind it."""

Turn: TypeAlias = tuple[int, int]
"""(-priority, when the request was first given room): of two attempts the lower one keeps or gets its room."""


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


@dataclass(eq=False)
class Tenant:
    """One attempt in the group: its rows come and are preempted together."""

    turn: Turn
    places: Places
    rows: "list[Row]" = field(default_factory=list)
    """Those that have not left, by number."""

    @property
    def age(self) -> tuple[Turn, int]:
        """Where it stands among all, the last to be preempted first."""
        return self.turn, self.rows[0].row_id

    def held(self, rank: int) -> int:
        """Blocks that its rows hold on a rank, shared ones once."""
        shared = self.places.shared.get(rank, 0)
        return (shared if self.rows else 0) + sum(row.blocks.get(rank, 0) - shared for row in self.rows)


@dataclass(eq=False)
class Row:
    """One choice of an attempt."""

    row_id: int
    tenant: Tenant = field(repr=False)
    blocks: dict[int, int]
    """Blocks on each of its holders, those that choices share included."""
    state: RowState = RowState.RESERVED
    num_planned: int = 1
    """New tokens planned so far; the first is prefill's."""

    @property
    def home(self) -> int:
        """Rank that takes its new tokens."""
        return self.tenant.places.home

    @property
    def shards(self) -> dict[int, tuple[int, int]]:
        """Tokens [begin, end) of the prompt on each of its holders."""
        return self.tenant.places.shards

    @property
    def needs_block(self) -> bool:
        """Whether the next step's token finds its blocks full."""
        return self.tenant.places.blocks_at_home(self.num_planned) > self.blocks[self.home]

    @property
    def may_grow(self) -> bool:
        """Whether its last token does."""
        places = self.tenant.places
        return places.blocks_at_home(places.max_new_tokens) > self.blocks[self.home]


@dataclass(frozen=True)
class Plan:
    """What every rank does next, in this order: release, reserve, admit, then (if `run`) one step."""

    sequence: int
    release: tuple[int, ...]
    reserve: tuple[int, ...]
    admit: tuple[int, ...]
    run: bool
    preempted: tuple[int, ...] = ()
    """Those of `release` that were preempted."""


@dataclass
class DecodeScheduler:
    """Rows, free blocks, and the plans that follow from them."""

    blocks_total: tuple[int, ...]
    """Blocks of each rank."""
    block_tokens: int
    min_holder_tokens: int
    """A prompt is spread over a further rank only while each would hold at least so many tokens."""
    rows: dict[int, Row] = field(default_factory=dict)
    """Those that have not left."""
    free: list[int] = field(init=False)
    """Blocks of each rank; those of a row that leaves are free for whatever a later command takes."""
    steps_in_flight: int = 0
    _next_row: int = 1
    _sequence: int = 0
    _reserve: list[int] = field(default_factory=list)
    _admit: list[int] = field(default_factory=list)
    _release: list[int] = field(default_factory=list)
    _preempted: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free = list(self.blocks_total)

    def reserve(
        self, num_tokens: int, max_new_tokens: int, num_choices: int = 1, turn: Turn = (0, 0)
    ) -> list[Row]:
        """Gives an attempt room for its prompt and the beginning of its output: a row for each choice.

        Later ones are preempted for it where that makes room; else it gets no block that a row may need next.

        Args:
            num_tokens: that prefill delivers.
            max_new_tokens: most tokens of each choice after these.
            num_choices: rows that share the prompt.
            turn: its own.

        Raises:
            NoRoomError: blocks are taken; later it may fit.
            NeverFitsError: the group is too small for it.
        """
        asked = (num_tokens, max_new_tokens, num_choices)
        victims, places = self._find_room(asked, turn)
        if places is None:
            if self._place(asked, self.blocks_total) is None:
                raise NeverFitsError
            raise NoRoomError
        for victim in victims:
            self._preempt(victim)
        tenant = Tenant(turn, places)
        for _ in range(num_choices):
            row = Row(self._next_row, tenant, dict(places.blocks))
            self._next_row += 1
            tenant.rows.append(row)
            self.rows[row.row_id] = row
            self._reserve.append(row.row_id)
        self._change_free(tenant, -1)
        return list(tenant.rows)

    def admit(self, row_id: int) -> None:
        """The row's KV is complete and its first token known: it decodes from the next step on."""
        self.rows[row_id].state = RowState.ACTIVE
        self._admit.append(row_id)

    def release(self, row_id: int) -> None:
        """The row leaves, finished or not; again is no news."""
        row = self.rows.pop(row_id, None)
        if row is None:
            return
        self._change_free(row.tenant, 1)
        row.tenant.rows.remove(row)
        self._change_free(row.tenant, -1)
        self._release.append(row_id)

    def step_done(self) -> None:
        """Every rank has reported a step."""
        self.steps_in_flight -= 1

    def next_plan(self) -> Plan | None:
        """The plan to send now, or None when there is nothing to say or two steps are under way."""
        if self.steps_in_flight < MAX_STEPS_IN_FLIGHT:
            self._grow()
        active = [row for row in self.rows.values() if row.state is RowState.ACTIVE]
        run = bool(active) and self.steps_in_flight < MAX_STEPS_IN_FLIGHT
        if not (run or self._reserve or self._admit or self._release):
            return None
        self._sequence += 1
        plan = Plan(
            self._sequence,
            tuple(self._release),
            tuple(self._reserve),
            tuple(self._admit),
            run,
            tuple(self._preempted),
        )
        self._release, self._reserve, self._admit, self._preempted = [], [], [], []
        if run:
            self.steps_in_flight += 1
            self._count_tokens(active)
        return plan

    def num_rows(self, state: RowState) -> int:
        """Rows in that state."""
        return sum(row.state is state for row in self.rows.values())

    @property
    def _tenants(self) -> list[Tenant]:
        """By age: the next to be preempted comes last."""
        return sorted({row.tenant for row in self.rows.values()}, key=lambda tenant: tenant.age)

    def _count_tokens(self, active: Sequence[Row]) -> None:
        """A row whose last token is planned leaves with the next plan, without waiting for that token."""
        for row in active:
            row.num_planned += 1
            if row.num_planned >= row.tenant.places.max_new_tokens:
                self.release(row.row_id)

    def _grow(self) -> None:
        """Gives each row the block that its next token needs, the first that came first."""
        growing = [row for row in self.rows.values() if row.state is RowState.ACTIVE and row.needs_block]
        for row in sorted(growing, key=lambda row: row.tenant.age):
            while row.row_id in self.rows and not self.free[row.home]:
                self._preempt([tenant for tenant in self._tenants if tenant.held(row.home)][-1])
            if row.row_id in self.rows:
                row.blocks[row.home] += 1
                self.free[row.home] -= 1

    def _preempt(self, tenant: Tenant) -> None:
        for row in list(tenant.rows):
            self._preempted.append(row.row_id)
            self.release(row.row_id)

    def _change_free(self, tenant: Tenant, sign: int) -> None:
        for rank in tenant.places.shards:
            self.free[rank] += sign * tenant.held(rank)

    def _find_room(self, asked: tuple[int, int, int], turn: Turn) -> tuple[list[Tenant], Places | None]:
        """The fewest later attempts, from the last on, without which it fits, and how it does."""
        tenants = self._tenants
        later = [tenant for tenant in tenants if tenant.turn > turn]
        for num_victims in range(len(later) + 1):
            stay = tenants[: len(tenants) - num_victims]
            if (places := self._place(asked, self._room_beside(stay))) is not None:
                return later[len(later) - num_victims :], places
        return [], None

    def _room_beside(self, tenants: Iterable[Tenant]) -> list[int]:
        """Blocks that neither these attempts nor their rows' next tokens take, by rank; may be negative."""
        room = list(self.blocks_total)
        for tenant in tenants:
            for rank in tenant.places.shards:
                room[rank] -= tenant.held(rank)
            room[tenant.places.home] -= sum(row.may_grow for row in tenant.rows)
        return room

    def _place(self, asked: tuple[int, int, int], room: Sequence[int]) -> Places | None:
        homes = [0] * len(self.blocks_total)
        for row in self.rows.values():
            homes[row.home] += 1
        counts = BlockCounts(self.blocks_total, tuple(room), tuple(homes))
        return place(*asked, counts, self.block_tokens, self.min_holder_tokens)
