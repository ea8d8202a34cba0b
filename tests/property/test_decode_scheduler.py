"""Any order of events: no rank ever needs more blocks than it has, nothing is left behind, every request ends."""

from dataclasses import dataclass, field
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sps2_decode_worker.placing import Asked, BlockCounts, place, tokens_ahead
from sps2_decode_worker.resizing import RowMoves
from sps2_decode_worker.scheduler import (
    MAX_STEPS_IN_FLIGHT,
    DecodeScheduler,
    NeverFitsError,
    NoRoomError,
)
from sps2_decode_worker.spread import Move
from sps2_decode_worker.tenants import Row, RowState

BLOCK = 64


@dataclass
class RankRow:
    """A row as the ranks have it, from the plans alone."""

    home: int
    shared: dict[int, int]
    """Blocks by rank that the rows of its attempt share; one object for all of them."""
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


@dataclass
class Ranks:
    """What the ranks of a group hold: they take blocks as the receiver and the loop of a rank do."""

    totals: tuple[int, ...]
    rows: dict[int, RankRow] = field(default_factory=dict)

    def execute(self, scheduler: DecodeScheduler, known: dict[int, Row]) -> list[int]:
        """The next plan, in order; the rows that made a token in it, None where there is no plan."""
        plan = scheduler.next_plan()
        if plan is None:
            return []
        skipped = set(plan.reserve) & set(plan.release)
        for row_id in set(plan.release) - skipped:
            del self.rows[row_id]
        prompts: dict[int, dict[int, int]] = {}
        for row_id in set(plan.reserve) - skipped:
            places = known[row_id].tenant.places
            begin, end = places.shards[places.home]
            shared = prompts.setdefault(id(places), dict(places.shared))
            blocks = -(-(end - begin + tokens_ahead(places.max_new_tokens)) // BLOCK)
            own = {places.home: blocks - shared[places.home]}
            self.rows[row_id] = RankRow(places.home, shared, own, (end - begin) % BLOCK)
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

    def _move(self, one: RowMoves) -> None:
        rows = [self.rows[row_id] for row_id in one.rows]
        for move in one.moves:
            shared = rows[0].shared
            shared[move.source] = shared.get(move.source, 0) - move.prompt_blocks
            shared[move.target] = shared.get(move.target, 0) + move.prompt_blocks
            assert shared[move.source] >= 0
            for row in rows:
                row.move(move)

    def held(self, rank: int) -> int:
        """Blocks of a rank in use, those that rows share once."""
        shared = {id(row.shared): row.shared.get(rank, 0) for row in self.rows.values()}
        return sum(shared.values()) + sum(row.own.get(rank, 0) for row in self.rows.values())


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
    )
    def reserve(self, tokens: int, more: int, choices: int, came: int, name: str) -> None:
        try:
            rows = self.scheduler.reserve(Asked(tokens, more, choices), came, name)
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
        if row is not None and row.state is RowState.RESERVED:
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
        for rank, total in enumerate(self.scheduler.blocks_total):
            held = sum(tenant.held(rank) for tenant in tenants)
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
    num_tokens: int = 0
    row: Row | None = None
    ready_at: int = 0
    num_preempted: int = 0

    def try_to_enter(self, scheduler: DecodeScheduler, tick: int) -> None:
        """One call of the router's."""
        new = self.max_tokens - self.num_tokens
        if self.row is None and tick >= self.came and new:
            try:
                asked = Asked(self.num_prompt + self.num_tokens, new)
                (self.row,) = scheduler.reserve(asked, self.came, str(id(self)))
            except NoRoomError:
                return
            self.ready_at = tick + self.delay

    def prefilled(self, scheduler: DecodeScheduler, tick: int) -> None:
        """Its KV has come, and a token with it; that may be the last."""
        if self.row is None or tick < self.ready_at or self.row.state is not RowState.RESERVED:
            return
        self.num_tokens += 1
        if self.num_tokens < self.max_tokens:
            scheduler.admit(self.row.row_id)
        else:
            scheduler.release(self.row.row_id)
            self.row = None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.builds(Request, st.integers(1, 300), st.integers(2, 250), st.integers(0, 60), st.integers(0, 5)),
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
            return
        order.shuffle(requests)
        for one in requests:
            one.try_to_enter(scheduler, tick)
            one.prefilled(scheduler, tick)
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
