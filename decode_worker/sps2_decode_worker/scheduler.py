"""Which rows a decode group holds and when a step runs. Pure: no torch, no clock, no network.

Given the same events it makes the same plans. It counts blocks for every rank, so that a rank never runs out of
them; which blocks they are is each rank's own affair. Plans go out one step ahead of what has been computed.

An attempt gets room for its prompt and the beginning of its output; the rest is taken block by block. When a rank
runs out, the attempt that came last there is preempted: it leaves, and the router brings it back when there is
room. The one that came first is never preempted and, coming back, takes its room from later ones, so that each
ends in its turn.

Before a rank runs out, whole blocks go from it to the rank with most room, a few with each step; so do those of an
attempt whose holders are to be others. Both ranks count what is under way as theirs; it is elsewhere from the next
plan on.

Attempts whose prompts begin alike use the same blocks (`sharing`): what one has brought, later ones take over, and it
is counted once, until the last of them leaves. Blocks with several users stay where they are.

An attempt that finds no room stands in line. Later ones pass the first in line where it finds its room beside them
once those that came before it have ended, and a few times where it does not. So a long request waits for earlier ones
and those few only, whatever stream of short ones comes behind it; and short ones do not wait behind a long one, but
for the room that it needs. What has passed is not preempted for whom it passed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from sps2_decode_worker.placing import Asked, BlockCounts, Places, place
from sps2_decode_worker.resizing import NotMovableError, RowMoves, choose_ranks
from sps2_decode_worker.sharing import HeldBlocks, Prefix, PromptBlocks, num_freed, num_used
from sps2_decode_worker.tenants import Row, RowState, Tenant

MAX_STEPS_IN_FLIGHT = 2
"""The step that computes and the one that waits behind it."""
MAX_PASSED = 8
"""How often the first in line is passed by what takes room that it needs."""


class NoRoomError(Exception):
    """Not enough free blocks now."""


class NeverFitsError(Exception):
    """More blocks than the group has."""


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
    moves: tuple[RowMoves, ...] = ()
    """What moves while the step computes; rows of the step alone."""
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
    blocks_per_plan: int = 8
    """Most blocks that move in one step."""
    rows: dict[int, Row] = field(default_factory=dict)
    """Those that have not left."""
    free: list[int] = field(init=False)
    """Blocks of each rank; those of a row that leaves are free for whatever a later command takes."""
    steps_in_flight: int = 0
    num_resizes: int = 0
    """That ended."""
    num_blocks_moved: int = 0
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
        victims, tenant = self._find_room(asked, turn, name)
        if tenant is None and self._place(asked, self.blocks_total) is None:
            raise NeverFitsError
        if tenant is None or not self._may_pass(tenant, victims):
            self.line.setdefault(name, Waiting(turn, asked, self._next_row))
            raise NoRoomError
        self.leave_line(name)
        for victim in victims:
            self._preempt(victim)
        self._next_row += asked.num_choices
        self.rows.update({row.row_id: row for row in tenant.rows})
        self._reserve.extend(row.row_id for row in tenant.rows)
        tenant.prompt.join()
        self._change_free(tenant, -1)
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
        with self._recounted(row.tenant):
            row.tenant.rows.remove(row)
            if not row.tenant.rows:
                row.tenant.prompt.leave()
        self._release.append(row_id)

    def resize(self, row_id: int, degree: int, ranks: tuple[int, ...] = ()) -> bool:
        """Begins to spread the row's attempt evenly over so many ranks; decoding goes on.

        Args:
            row_id: a row that decodes.
            degree: holders that it is to have.
            ranks: which ones; empty: those that need least be moved. Without its home among them it gets another.

        Returns:
            Whether anything has to move.

        Raises:
            NotMovableError: its rows do not all decode yet, or a resize is under way.
            TooShortError: it has fewer blocks than that.
            NoRoomError: these ranks cannot take it now.
        """
        tenant = self.rows[row_id].tenant
        if not tenant.moves_now:
            raise NotMovableError(tenant.why_not_movable)
        room, homes = self._room_beside(self._tenants), self._num_at_home()
        holders = ranks or choose_ranks(tenant.spread, degree, room)
        home = tenant.spread.home
        if home not in holders:
            home = min(holders, key=lambda rank: (homes[rank], rank))
        resize, spread = tenant.plan_resize(holders, home)
        incoming = [resize.incoming(rank, len(tenant.rows)) for rank in range(len(room))]
        fits = all(new <= max(0, left) for new, left in zip(incoming, room, strict=True))
        if not (fits and tenant.fits_at_home(spread, self.blocks_total[home])):
            raise NoRoomError
        if not any(incoming):
            return False
        with self._recounted(tenant):
            tenant.resize = resize
        return True

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
        moves = self._moves() if run else ()
        self._sequence += 1
        plan = Plan(
            self._sequence,
            tuple(self._release),
            tuple(self._reserve),
            tuple(self._admit),
            run,
            tuple(self._preempted),
            moves,
            tuple(self._used),
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
    def _used(self) -> Iterator[int]:
        """Blocks in use on each rank; what is promised is not used yet."""
        tenants = dict.fromkeys(row.tenant for row in self.rows.values())
        for rank, (total, free) in enumerate(zip(self.blocks_total, self.free, strict=True)):
            yield total - free - sum(one.promised(rank) for one in tenants)

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
                for tenant in self._last_to_free(row.home):
                    self._preempt(tenant)
            if row.row_id in self.rows:
                row.blocks[row.home] += 1
                self.free[row.home] -= 1

    def _last_to_free(self, rank: int) -> list[Tenant]:
        """The last attempt whose leaving frees blocks of a rank, with those that must leave for that as well."""
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

    def _change_free(self, tenant: Tenant, sign: int) -> None:
        for rank in range(len(self.free)):
            self.free[rank] += sign * tenant.alone(rank)

    def _moves(self) -> tuple[RowMoves, ...]:
        """What moves with the next step: of resizes under way, else away from the rank that runs low."""
        made: list[RowMoves] = []
        most = self.blocks_per_plan
        for tenant in dict.fromkeys(row.tenant for row in self.rows.values() if row.tenant.resize):
            # A change of home goes with the next step whatever else does: the moves behind it were planned for that.
            if most > 0 or tenant.changes_home:
                with self._recounted(tenant):
                    made.append(tenant.go_on(most))
                most -= made[-1].num_blocks
        self.num_resizes += sum(one.last for one in made)
        if not made and min(self.free) < len(self.rows):
            made = self._relieve(most)
        self.num_blocks_moved += sum(one.num_blocks for one in made)
        return tuple(made)

    def _relieve(self, most: int) -> list[RowMoves]:
        """Moves blocks of the largest attempt from the rank that lacks most to the one with most room."""
        slack = list(self.free)
        for row in self.rows.values():
            slack[row.home] -= row.may_grow
        source, target = (slack.index(end(slack)) for end in (min, max))
        num = min(most, slack[target], (slack[target] - slack[source]) // 2)
        if slack[source] >= 0 or num < 1:
            return []
        by_size = sorted(self._tenants, key=lambda tenant: -sum(map(tenant.held, range(len(slack)))))
        for tenant in by_size:
            if tenant.moves_now and (move := tenant.away(source, target, num)) is not None:
                with self._recounted(tenant):
                    return [tenant.give(move)]
        return []

    @contextmanager
    def _recounted(self, tenant: Tenant) -> Iterator[None]:
        """What a tenant holds may change inside."""
        self._change_free(tenant, 1)
        yield
        self._change_free(tenant, -1)

    def _find_room(self, asked: Asked, turn: int, name: str) -> tuple[list[Tenant], Tenant | None]:
        """The fewest later attempts, from the last on, without which it fits, and it itself where it does."""
        tenants = self._tenants
        since = self.line[name].since if name in self.line else self._next_row
        later = [tenant for tenant in tenants if tenant.turn > turn and tenant.number < since]
        for num_stay in range(len(later), -1, -1):
            victims = later[num_stay:]
            stay = [tenant for tenant in tenants if tenant not in victims]
            room, donor = self._room_beside(stay), self._find_donor(stay, asked.prefix)
            held = donor.prompt.where(donor.prompt.prefix.num_common(asked.prefix)) if donor else ()
            if donor and (places := self._place(asked, room, held)) is not None:
                return victims, self._tenant(asked, turn, places, donor)
            if (places := self._place(asked, room)) is not None:
                return victims, self._tenant(asked, turn, places)
        return [], None

    def _find_donor(self, tenants: Iterable[Tenant], prefix: Prefix) -> Tenant | None:
        """Which of these attempts has most of the prompt's blocks, if enough to be worth it.

        In a group of several ranks, a few tokens are not worth that a row is bound to the rank that has them.
        """
        least = self.min_holder_tokens if len(self.blocks_total) > 1 else 1
        donor, most = None, -(-least // self.block_tokens) - 1
        for tenant in tenants:
            if tenant.gives_now and (common := tenant.prompt.prefix.num_common(prefix)) > most:
                donor, most = tenant, common
        return donor

    def _tenant(self, asked: Asked, turn: int, places: Places, donor: Tenant | None = None) -> Tenant:
        held = donor.prompt.first(sum(one.num_blocks for one in places.held)) if donor else []
        prompt = PromptBlocks.of(asked.prefix, held, places.brought)
        tenant = Tenant(turn, self._next_row, places, prompt, donor.rows[0].row_id if donor else 0)
        tenant.rows = [
            Row(self._next_row + index, tenant, dict(places.blocks)) for index in range(asked.num_choices)
        ]
        return tenant

    def _may_pass(self, tenant: Tenant, victims: Sequence[Tenant]) -> bool:
        """Whether an attempt may come in before the first in line, where that came before it; counts it if so."""
        first = min(self.line.values(), key=lambda waiting: waiting.turn, default=None)
        if first is None or first.turn >= tenant.turn:
            return True
        later = [one for one in self._tenants if one.turn > first.turn and one not in victims]
        room = self._without([*later, tenant], Tenant.own_at_last)
        if self._place(first.asked, room) is not None:
            return True
        if first.num_passed >= MAX_PASSED:
            return False
        first.num_passed += 1
        return True

    def _room_beside(self, tenants: Sequence[Tenant]) -> list[int]:
        """Blocks that neither these attempts nor their rows' next tokens take, by rank; may be negative."""
        room = self._without(tenants, Tenant.own)
        for tenant in tenants:
            room[tenant.spread.home] -= sum(row.may_grow for row in tenant.rows)
        return room

    def _without(self, tenants: Sequence[Tenant], own: Callable[[Tenant, int], int]) -> list[int]:
        """All blocks but those of these attempts' prompts and, by rank, their own; may be negative."""
        used = num_used((tenant.prompt for tenant in tenants), len(self.blocks_total))
        return [
            total - used[rank] - sum(own(tenant, rank) for tenant in tenants)
            for rank, total in enumerate(self.blocks_total)
        ]

    def _place(self, asked: Asked, room: Sequence[int], held: tuple[HeldBlocks, ...] = ()) -> Places | None:
        counts = BlockCounts(self.blocks_total, tuple(room), tuple(self._num_at_home()))
        return place(asked, counts, self.block_tokens, self.min_holder_tokens, held)

    def _num_at_home(self) -> list[int]:
        homes = [0] * len(self.blocks_total)
        for row in self.rows.values():
            homes[row.home] += 1
        return homes


def _frees(leaving: Sequence[Tenant], rank: int) -> bool:
    """Whether blocks of a rank are free when these leave together."""
    own = sum(tenant.own(rank) for tenant in leaving)
    return own + num_freed([tenant.prompt for tenant in leaving], rank) > 0
