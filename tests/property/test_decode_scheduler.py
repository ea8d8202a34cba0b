"""Any order of events: no rank ever needs more blocks than it has, nothing is left behind, every request ends.

Prompts may begin alike and are then held once; requests are preempted, come back and are spread over other ranks.
"""

import itertools
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import TypeAlias

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sps2_decode_worker.placing import Asked, BlockCounts, place, tokens_ahead
from sps2_decode_worker.resizing import NotMovableError, RowMoves
from sps2_decode_worker.scheduler import (
    MAX_STEPS_IN_FLIGHT,
    DecodeScheduler,
    NeverFitsError,
    NoRoomError,
)
from sps2_decode_worker.sharing import Prefix
from sps2_decode_worker.spread import Move, TooShortError
from sps2_decode_worker.tenants import Row, RowState, Tenant

BLOCK = 64
RESIZED = 0.02
"""How often somebody wants a request on other ranks, for each tick."""
Block: TypeAlias = tuple[int, int]
"""Rank and a number."""


def alike(family: int, num_tokens: int) -> Prefix:
    """Prompts of a family begin alike, block for block; those of family 0 have nothing in common with others."""
    num_named = num_tokens // BLOCK if family else 0
    return Prefix(None, tuple(bytes([family, index]) for index in range(num_named)))


@dataclass
class RankRow:
    """A row as the ranks have it, from the plans alone."""

    home: int
    prompt: list[Block]
    """Whole blocks of the prompt; one object for the rows of an attempt, and the same blocks for those that share."""
    own: dict[int, int]
    """Blocks by rank that it has for itself."""
    num_at_home: int
    """Tokens in those at home."""
    active: bool = False

    def append(self) -> None:
        """A token more."""
        self.num_at_home += 1
        if self.num_at_home > self.own[self.home] * BLOCK:
            self.own[self.home] += 1

    def move(self, move: Move) -> None:
        """Blocks of its own go from rank to rank."""
        self.own[move.source] = self.own.get(move.source, 0) - move.own_blocks
        self.own[move.target] = self.own.get(move.target, 0) + move.own_blocks
        assert self.own[move.source] >= 0
        self.num_at_home += (
            BLOCK * move.own_blocks * ((move.target == self.home) - (move.source == self.home))
        )

    def hand_over(self, home: int) -> None:
        """The block that grows goes to another home."""
        if home != self.home:
            self.own[self.home] = (self.num_at_home - 1) // BLOCK
            self.home, self.num_at_home = home, (self.num_at_home - 1) % BLOCK + 1
            self.own[home] = self.own.get(home, 0) + 1
            self.num_at_home += BLOCK * (self.own[home] - 1)


@dataclass
class Ranks:
    """What the ranks of a group hold: they take blocks as the receiver and the loop of a rank do."""

    totals: tuple[int, ...]
    rows: dict[int, RankRow] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)
    num_held: int = 0
    """Blocks that were taken over."""

    def execute(self, scheduler: DecodeScheduler, known: dict[int, Row]) -> list[int]:
        """The next plan, in order; the rows that made a token in it, None where there is no plan."""
        plan = scheduler.next_plan()
        if plan is None:
            return []
        skipped = set(plan.reserve) & set(plan.release)
        coming = [known[row_id] for row_id in plan.reserve if row_id not in skipped]
        prompts = {row.tenant: self._prompt(row.tenant) for row in coming}
        for row_id in set(plan.release) - skipped:
            del self.rows[row_id]
        for row in coming:
            places = row.tenant.places
            num_in_own = places.num_tokens - len(prompts[row.tenant]) * BLOCK
            own = {places.home: -(-(num_in_own + tokens_ahead(places.max_new_tokens)) // BLOCK)}
            self.rows[row.row_id] = RankRow(places.home, prompts[row.tenant], own, num_in_own)
        for row_id in set(plan.admit) & set(self.rows):
            self.rows[row_id].active = True
        made = [row_id for row_id, row in self.rows.items() if row.active] if plan.run else []
        for row_id in made:
            self.rows[row_id].append()
        for one in plan.moves:
            self._move(one)
        for rank, total in enumerate(self.totals):
            assert self.held(rank) == plan.blocks_used[rank] <= total
        return made

    def _prompt(self, tenant: Tenant) -> list[Block]:
        """What a new attempt takes over from one that has not left yet, and its own blocks behind it."""
        places = tenant.places
        num_held = sum(one.num_blocks for one in places.held)
        held = self.rows[tenant.held_from].prompt[:num_held] if num_held else []
        assert [rank for rank, _ in held] == [rank for rank, num in places.held for _ in range(num)]
        self.num_held += num_held
        return [*held, *((rank, next(self.numbers)) for rank, num in places.brought for _ in range(num))]

    def _move(self, one: RowMoves) -> None:
        rows = [self.rows[row_id] for row_id in one.rows]
        prompt = rows[0].prompt
        for move in one.moves:
            leaving = [block for block in prompt if block[0] == move.source][: move.prompt_blocks]
            assert len(leaving) == move.prompt_blocks
            others = {block for row in self.rows.values() if row.prompt is not prompt for block in row.prompt}
            assert not others & set(leaving), "blocks that others use stay where they are"
            prompt[:] = [block for block in prompt if block not in leaving]
            prompt += [(move.target, next(self.numbers)) for _ in leaving]
            for row in rows:
                row.move(move)
        for row in rows:
            row.hand_over(one.home)

    def held(self, rank: int) -> int:
        """Blocks of a rank in use, those that rows share once."""
        prompts = {block for row in self.rows.values() for block in row.prompt if block[0] == rank}
        return len(prompts) + sum(row.own.get(rank, 0) for row in self.rows.values())


class SchedulerMachine(RuleBasedStateMachine):
    """Rows that come, in turn or out of it, and go at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = DecodeScheduler((6, 9), BLOCK, 64)
        self.ranks = Ranks((6, 9))
        self.known: dict[int, Row] = {}

    @rule(
        tokens=st.integers(1, 400),
        more=st.integers(1, 300),
        choices=st.integers(1, 3),
        came=st.integers(0, 20),
        name=st.sampled_from("abcde"),
        family=st.integers(0, 2),
    )
    def reserve(self, tokens: int, more: int, choices: int, came: int, name: str, family: int) -> None:
        asked = Asked(tokens, more, choices, alike(family, tokens))
        try:
            rows = self.scheduler.reserve(asked, came, name)
        except (NoRoomError, NeverFitsError):
            return
        self.known.update({row.row_id: row for row in rows})

    @rule(name=st.sampled_from("abcde"))
    def give_up(self, name: str) -> None:
        self.scheduler.leave_line(name)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def admit(self, data: st.DataObject) -> None:
        row_id = data.draw(st.sampled_from(sorted(self.known)))
        row = self.scheduler.rows.get(row_id)
        taken_up = row_id in self.ranks.rows  # before that nothing is sent
        if taken_up and row is not None and row.state is RowState.RESERVED:
            self.scheduler.admit(row_id)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.scheduler.release(data.draw(st.sampled_from(sorted(self.known))))

    @rule(steps=st.integers(1, 100))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.ranks.execute(self.scheduler, self.known)
            self.scheduler.steps_in_flight = min(1, self.scheduler.steps_in_flight)

    @rule()
    def send_plans(self) -> None:
        while self.ranks.execute(self.scheduler, self.known):
            pass

    @invariant()
    def blocks_are_counted(self) -> None:
        tenants = {row.tenant for row in self.scheduler.rows.values()}
        runs = {run for tenant in tenants for run in tenant.prompt.runs}
        for rank, total in enumerate(self.scheduler.blocks_total):
            held = sum(run.num_blocks for run in runs if run.rank == rank)
            held += sum(tenant.own(rank) for tenant in tenants)
            assert self.scheduler.free[rank] + held == total
            assert self.scheduler.free[rank] >= 0
        assert 0 <= self.scheduler.steps_in_flight <= MAX_STEPS_IN_FLIGHT

    def teardown(self) -> None:
        for row_id in self.known:
            self.scheduler.release(row_id)
        self.scheduler.steps_in_flight = 0
        while self.scheduler.next_plan() is not None:
            pass
        assert self.scheduler.free == list(self.scheduler.blocks_total)
        assert not self.scheduler.rows


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@dataclass
class Request:
    """A request and its life outside the group: it comes back until it has all of its tokens."""

    num_prompt: int
    max_tokens: int
    came: int
    delay: int
    """Ticks of each prefill."""
    family: int
    """Those of one family but 0 begin alike."""
    num_tokens: int = 0
    row: Row | None = None
    ready_at: int = 0
    num_preempted: int = 0

    def try_to_enter(self, scheduler: DecodeScheduler, tick: int) -> None:
        """One call of the router's."""
        new = self.max_tokens - self.num_tokens
        if self.row is None and tick >= self.came and new:
            try:
                names = alike(self.family, self.num_prompt)
                asked = Asked(self.num_prompt + self.num_tokens, new, prefix=names)
                (self.row,) = scheduler.reserve(asked, self.came, str(id(self)))
            except NoRoomError:
                return
            self.ready_at = tick + 1 + self.delay  # the ranks take it up with a plan before anything is sent

    def prefilled(self, scheduler: DecodeScheduler, tick: int) -> None:
        """Its KV has come, and a token with it; that may be the last."""
        if self.row is None or self.row.row_id not in scheduler.rows or tick < self.ready_at:
            return
        if self.row.state is not RowState.RESERVED:
            return
        self.num_tokens += 1
        if self.num_tokens < self.max_tokens:
            scheduler.admit(self.row.row_id)
        else:
            scheduler.release(self.row.row_id)
            self.row = None

    def resize(self, scheduler: DecodeScheduler, degree: int) -> None:
        """Somebody wants it on more or fewer ranks."""
        if self.row is not None:
            with suppress(NotMovableError, TooShortError, NoRoomError):
                scheduler.resize(self.row.row_id, degree)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.builds(
            Request,
            st.integers(1, 300),
            st.integers(2, 250),
            st.integers(0, 60),
            st.integers(0, 5),
            st.integers(0, 2),
        ),
        min_size=2,
        max_size=7,
    ),
    st.sampled_from([(9,), (6, 9), (5, 5, 5)]),
    st.integers(0, 2**32),
)
def test_every_request_ends(requests: list[Request], totals: tuple[int, ...], seed: int) -> None:
    order = Random(seed)
    scheduler, ranks = DecodeScheduler(totals, BLOCK, 128), Ranks(totals)
    fresh = BlockCounts(totals, totals, (0,) * len(totals))
    requests = [one for one in requests if place(Asked(one.num_prompt, one.max_tokens), fresh, BLOCK, 128)]
    known: dict[int, Row] = {}
    for tick in range(20_000):
        if all(one.num_tokens == one.max_tokens for one in requests):
            ranks.execute(scheduler, known)
            assert not ranks.rows
            assert scheduler.free == list(totals)
            return
        order.shuffle(requests)
        for one in requests:
            one.try_to_enter(scheduler, tick)
            one.prefilled(scheduler, tick)
            if order.random() < RESIZED:
                one.resize(scheduler, order.randint(1, len(totals)))
            if one.row is not None:
                known[one.row.row_id] = one.row
        made = set(ranks.execute(scheduler, known))
        scheduler.steps_in_flight = 0
        for one in requests:
            if one.row is None:
                continue
            one.num_tokens += one.row.row_id in made
            if one.num_tokens == one.max_tokens:
                scheduler.release(one.row.row_id)
                one.row = None
            elif one.row.row_id not in scheduler.rows:
                one.row, one.num_preempted = None, one.num_preempted + 1
    raise AssertionError(f"still not done: {requests}")


@settings(max_examples=300)
@given(st.integers(1, 900), st.integers(1, 600), st.integers(1, 5), st.integers(2, 12), st.data())
def test_what_fits_once_fits_when_it_comes_back(
    num_prompt: int, max_tokens: int, num_ranks: int, blocks: int, data: st.DataObject
) -> None:
    group = BlockCounts((blocks,) * num_ranks, (blocks,) * num_ranks, (0,) * num_ranks)
    if place(Asked(num_prompt, max_tokens), group, BLOCK, 128) is None:
        return
    done = data.draw(st.integers(0, max_tokens - 1))
    assert place(Asked(num_prompt + done, max_tokens - done), group, BLOCK, 128) is not None
