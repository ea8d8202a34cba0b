"""Which rows a decode group holds and when a step runs. Pure: no torch, no clock, no network.

Given the same events it makes the same plans. It counts blocks for every rank, so that a rank never runs out of
them; which blocks they are is each rank's own affair. Plans go out one step ahead of what has been computed.

An attempt gets room for its prompt and the beginning of its output; the rest is taken block by block. When a rank
runs out, the attempt that came last there is preempted: it leaves, and the router brings it back when there is
room. The one that came first is never preempted and, coming back, takes its room from later ones, so that each
ends in its turn.

Attempts whose prompts begin alike use the same blocks (`sharing`): what one has brought, later ones take over, and it
is counted once, until the last of them leaves.

An attempt that finds no room stands in line. Later ones pass the first in line where it finds its room beside them
once those that came before it have ended, and a few times where it does not. So a long request waits for earlier ones
and those few only, whatever stream of short ones comes behind it; and short ones do not wait behind a long one, but
for the room that it needs. What has passed is not preempted for whom it passed.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from sps2_decode_worker.placing import Asked, BlockCounts, Places, place
from sps2_decode_worker.sharing import HeldBlocks, Prefix, PromptBlocks, num_freed, num_used

MAX_STEPS_IN_FLIGHT = 2
"""The step that computes and the one that waits behind it."""
MAX_PASSED = 8
"""How often the first in line is passed by what takes room that it needs."""


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

    turn: int
    """Of two attempts the one with the lower turn keeps or gets its room."""
    number: int
    """Counts attempts."""
    places: Places
    prompt: PromptBlocks
    held_from: int = 0
    """A row of the attempt that brought `places.held`; 0 where nothing is held. It may have left since."""
    rows: "list[Row]" = field(default_factory=list)
    """Those that have not left, by number."""

    @property
    def age(self) -> tuple[int, int]:
        """Where it stands among all, the last to be preempted first."""
        return self.turn, self.number

    @property
    def complete(self) -> bool:
        """Whether the prompt's KV is there: its full blocks will not change any more."""
        return any(row.state is RowState.ACTIVE for row in self.rows)

    @property
    def shares_with_others(self) -> bool:
        """Whether another attempt uses some of its blocks."""
        return self.prompt.is_shared

    def held(self, rank: int) -> int:
        """Blocks that its rows hold on a rank, shared ones once."""
        return (self.places.shared.get(rank, 0) if self.rows else 0) + self.own(rank)

    def own(self, rank: int) -> int:
        """Those of a rank that belong to one row alone."""
        return sum(row.own(rank) for row in self.rows)

    def own_at_last(self, rank: int) -> int:
        """The same when the output of its rows is as long as it may become."""
        return len(self.rows) * self.places.own_at_last(rank)


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

    def own(self, rank: int) -> int:
        """Its blocks on a rank that no other row uses."""
        return self.blocks.get(rank, 0) - self.tenant.places.shared.get(rank, 0)

    @property
    def home(self) -> int:
        """Rank that takes its new tokens."""
        return self.tenant.places.home

    @property
    def shards(self) -> dict[int, tuple[int, int]]:
        """Tokens [begin, end) of the prompt that prefill delivers to each rank."""
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


@dataclass
class Waiting:
    """An attempt that found no room and will ask again."""

    turn: int
    asked: Asked
    since: int
    """Attempts with this number or a higher one have come in since."""
    num_passed: int = 0
    """Of them, those that took room which it needs, while it was the first in line."""


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
    blocks_used: tuple[int, ...] = field(default=(), compare=False)
    """Of each rank, once the plan is executed; they follow from all plans so far."""


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
    line: dict[str, Waiting] = field(default_factory=dict)
    """Those that wait for room, by name."""
    _next_row: int = 1
    _sequence: int = 0
    _reserve: list[int] = field(default_factory=list)
    _admit: list[int] = field(default_factory=list)
    _release: list[int] = field(default_factory=list)
    _preempted: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free = list(self.blocks_total)

    def reserve(self, asked: Asked, turn: int = 0, name: str = "") -> list[Row]:
        """Gives an attempt room for its prompt and the beginning of its output: a row for each choice.

        It takes over the beginning of its prompt where another attempt has brought it. Later ones are preempted for
        it where that makes room; else it gets no block that a row may need next.

        Args:
            asked: its size.
            turn: its own; the lower, the earlier.
            name: by which it is known in line when it asks again.

        Raises:
            NoRoomError: blocks are taken, or the first in line needs them; it stands in line now.
            NeverFitsError: the group is too small for it.
        """
        room = self._find_room(asked, turn, name)
        if room is None and self._place(asked, self.blocks_total) is None:
            raise NeverFitsError
        if room is None or not self._may_pass(asked, turn, room):
            self.line.setdefault(name, Waiting(turn, asked, self._next_row))
            raise NoRoomError
        self.leave_line(name)
        for victim in room.victims:
            self._preempt(victim)
        tenant = _enter(asked, turn, self._next_row, room)
        for one in room.places.brought:
            self.free[one.rank] -= one.num_blocks
        for row in tenant.rows:
            self._change_free(row, -1)
        self._next_row += asked.num_choices
        self.rows.update({row.row_id: row for row in tenant.rows})
        self._reserve.extend(row.row_id for row in tenant.rows)
        return list(tenant.rows)

    def leave_line(self, name: str) -> None:
        """The attempt of that name will not ask again; one that does not stand in line is no news."""
        self.line.pop(name, None)

    def admit(self, row_id: int) -> None:
        """The row's KV is complete and its first token known: it decodes from the next step on."""
        self.rows[row_id].state = RowState.ACTIVE
        self._admit.append(row_id)

    def release(self, row_id: int) -> None:
        """The row leaves, finished or not; again is no news."""
        row = self.rows.pop(row_id, None)
        if row is None:
            return
        row.tenant.rows.remove(row)
        self._change_free(row, 1)
        if not row.tenant.rows:
            for run in row.tenant.prompt.leave():
                self.free[run.rank] += run.num_blocks
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
            tuple(total - free for total, free in zip(self.blocks_total, self.free, strict=True)),
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
                for victim in self._last_to_free(row.home):
                    self._preempt(victim)
            if row.row_id in self.rows:
                row.blocks[row.home] += 1
                self.free[row.home] -= 1

    def _last_to_free(self, rank: int) -> list[Tenant]:
        """The last attempt whose leaving frees blocks of a rank, with the later ones that must leave for that."""
        leaving: list[Tenant] = []
        for tenant in reversed(self._tenants):
            leaving.append(tenant)
            if _frees(leaving, rank):
                break
        for tenant in list(leaving):
            without = [one for one in leaving if one is not tenant]
            if _frees(without, rank):
                leaving = without
        return leaving

    def _preempt(self, tenant: Tenant) -> None:
        for row in list(tenant.rows):
            self._preempted.append(row.row_id)
            self.release(row.row_id)

    def _change_free(self, row: Row, sign: int) -> None:
        """Counts the blocks that no other row uses."""
        for rank in row.blocks:
            self.free[rank] += sign * row.own(rank)

    def _find_room(self, asked: Asked, turn: int, name: str) -> "_Room | None":
        """The fewest later attempts, from the last on, without which it fits, and how it does."""
        tenants = self._tenants
        since = self.line[name].since if name in self.line else self._next_row
        later = [tenant for tenant in tenants if tenant.turn > turn and tenant.number < since]
        for num_stay in range(len(later), -1, -1):
            victims = later[num_stay:]
            stay = [tenant for tenant in tenants if tenant not in victims]
            room = self._room_beside(stay)
            donor, held = self._find_held(stay, asked.prefix)
            if held and (places := self._place(asked, room, held)) is not None:
                return _Room(places, victims, donor)
            if (places := self._place(asked, room)) is not None:
                return _Room(places, victims)
        return None

    def _may_pass(self, asked: Asked, turn: int, room: "_Room") -> bool:
        """Whether an attempt may come in before the first in line, where that came before it; counts it if so."""
        first = min(self.line.values(), key=lambda waiting: waiting.turn, default=None)
        if first is None or first.turn >= turn:
            return True
        later = [one for one in self._tenants if one.turn > first.turn and one not in room.victims]
        left = list(self.blocks_total)
        for rank, used in enumerate(num_used((one.prompt for one in later), len(left))):
            left[rank] -= used + sum(one.own_at_last(rank) for one in later)
        taken = room.places
        for rank in taken.holders:
            left[rank] -= taken.shared[rank] + asked.num_choices * taken.own_at_last(rank)
            if room.donor in later:
                left[rank] += taken.held_at(rank)
        if self._place(first.asked, left) is not None:
            return True
        if first.num_passed >= MAX_PASSED:
            return False
        first.num_passed += 1
        return True

    def _find_held(
        self, tenants: Sequence[Tenant], prefix: Prefix
    ) -> tuple[Tenant | None, tuple[HeldBlocks, ...]]:
        """Which of these attempts has most of the prompt's blocks, and where they lie.

        In a group of several ranks, a few tokens are not worth that its row is bound to the rank that has them.
        """
        least = self.min_holder_tokens if len(self.blocks_total) > 1 else 1
        donor, most = None, -(-least // self.block_tokens) - 1
        for tenant in tenants:
            if tenant.complete and (common := tenant.prompt.prefix.num_common(prefix)) > most:
                donor, most = tenant, common
        return donor, donor.prompt.where(most) if donor else ()

    def _room_beside(self, tenants: Sequence[Tenant]) -> list[int]:
        """Blocks that neither these attempts nor their rows' next tokens take, by rank; may be negative."""
        used = num_used((tenant.prompt for tenant in tenants), len(self.blocks_total))
        room = [total - taken for total, taken in zip(self.blocks_total, used, strict=True)]
        for row in (row for tenant in tenants for row in tenant.rows):
            for rank in row.blocks:
                room[rank] -= row.own(rank)
            room[row.home] -= row.may_grow
        return room

    def _place(self, asked: Asked, room: Sequence[int], held: tuple[HeldBlocks, ...] = ()) -> Places | None:
        homes = [0] * len(self.blocks_total)
        for row in self.rows.values():
            homes[row.home] += 1
        counts = BlockCounts(self.blocks_total, tuple(room), tuple(homes))
        return place(asked, counts, self.block_tokens, self.min_holder_tokens, held)


@dataclass(frozen=True)
class _Room:
    """Where a new attempt can go."""

    places: Places
    victims: Sequence[Tenant]
    """Who has to leave for it."""
    donor: Tenant | None = None
    """Whose blocks it takes over; stays."""


def _enter(asked: Asked, turn: int, number: int, room: _Room) -> Tenant:
    """A new attempt there; its number is that of its first row."""
    places, donor = room.places, room.donor
    held = donor.prompt.first(sum(one.num_blocks for one in places.held)) if donor else []
    prompt = PromptBlocks.of(asked.prefix, held, places.brought)
    tenant = Tenant(turn, number, places, prompt, donor.rows[0].row_id if donor else 0)
    tenant.rows = [Row(number + index, tenant, dict(places.blocks)) for index in range(asked.num_choices)]
    return tenant


def _frees(leaving: Sequence[Tenant], rank: int) -> bool:
    """Whether blocks of a rank are free when these leave together."""
    own = sum(tenant.own(rank) for tenant in leaving)
    return own + num_freed([tenant.prompt for tenant in leaving], rank) > 0
