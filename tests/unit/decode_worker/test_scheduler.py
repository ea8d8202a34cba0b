"""The pure decode scheduler: blocks, plans one step ahead, rows that leave."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sps2_decode_worker.scheduler import (
    MAX_STEPS_IN_FLIGHT,
    DecodeScheduler,
    NeverFitsError,
    NoRoomError,
    Plan,
    Row,
    RowState,
)

BLOCK = 64


def make(*blocks: int, min_holder_tokens: int = 128) -> DecodeScheduler:
    return DecodeScheduler(blocks, BLOCK, min_holder_tokens)


def drain(scheduler: DecodeScheduler) -> list[Plan]:
    plans = []
    while (plan := scheduler.next_plan()) is not None:
        plans.append(plan)
    return plans


def test_a_row_is_reserved_admitted_and_stepped_one_step_ahead() -> None:
    scheduler = make(10, 10)
    (row,) = scheduler.reserve(500, 8)
    assert drain(scheduler) == [Plan(1, (), (row.row_id,), (), run=False)]
    scheduler.admit(row.row_id)
    assert drain(scheduler) == [Plan(2, (), (), (row.row_id,), run=True), Plan(3, (), (), (), run=True)]
    assert scheduler.steps_in_flight == MAX_STEPS_IN_FLIGHT
    scheduler.step_done()
    assert drain(scheduler) == [Plan(4, (), (), (), run=True)]


def test_the_last_token_by_length_needs_no_step_beyond() -> None:
    """max_tokens 3: the first token is prefill's, two steps make the rest, the release follows by itself."""
    scheduler = make(10)
    (row,) = scheduler.reserve(10, 3)
    drain(scheduler)
    scheduler.admit(row.row_id)
    plans = drain(scheduler)
    assert [plan.run for plan in plans] == [True, True, False]
    assert plans[-1].release == (row.row_id,)
    assert scheduler.free == [10]


def test_a_prompt_is_spread_over_the_ranks_with_most_room() -> None:
    scheduler = make(10, 20, 20)
    (row,) = scheduler.reserve(300, 64)
    assert row.shards == {1: (0, 128), 2: (128, 300)}
    assert row.home == 1
    assert row.blocks == {1: 3, 2: 3}
    assert scheduler.free == [10, 17, 17]


def test_homes_are_spread() -> None:
    scheduler = make(100, 100)
    assert [scheduler.reserve(1000, 1)[0].home for _ in range(4)] == [0, 1, 0, 1]


def test_a_row_released_before_its_plan_went_out_costs_nothing() -> None:
    scheduler = make(10)
    (row,) = scheduler.reserve(100, 1)
    scheduler.release(row.row_id)
    (plan,) = drain(scheduler)
    assert plan.release == plan.reserve == (row.row_id,)
    assert scheduler.free == [10]


def test_no_room_now_is_told_from_never() -> None:
    scheduler = make(4)
    scheduler.reserve(100, 60)
    with pytest.raises(NoRoomError):
        scheduler.reserve(100, 60)
    with pytest.raises(NeverFitsError):
        scheduler.reserve(1000, 1)


def test_choices_share_what_they_do_not_write() -> None:
    """130 tokens are 2 full blocks and 2 tokens: each choice has a copy of the third, and 1 for its output."""
    scheduler = make(20)
    rows = scheduler.reserve(130, 64, 3)
    assert scheduler.free == [20 - 2 - 3 * 2]
    (plan,) = drain(scheduler)
    assert plan.reserve == tuple(row.row_id for row in rows)
    scheduler.release(rows[0].row_id)
    drain(scheduler)
    assert scheduler.free == [20 - 2 - 2 * 2]
    for row in rows[1:]:
        scheduler.release(row.row_id)
    drain(scheduler)
    assert scheduler.free == [20]


def test_choices_share_all_blocks_of_other_holders() -> None:
    scheduler = make(10, 10)
    rows = scheduler.reserve(256, 1, 4)
    assert rows[0].shards == {0: (0, 128), 1: (128, 256)}
    assert scheduler.free == [10 - 2 - 4, 10 - 2]


def test_room_is_found_for_all_choices_or_none() -> None:
    scheduler = make(4)
    with pytest.raises(NeverFitsError):
        scheduler.reserve(10, 10, 5)
    assert scheduler.free == [4]
    scheduler.reserve(10, 10, 4)
    assert scheduler.free == [0]


@dataclass
class Ranks:
    """What one rank would hold, from the plans alone."""

    blocks: dict[int, int] = field(default_factory=dict)
    admitted: set[int] = field(default_factory=set)


def held(rank: int, rows: Iterable[Row]) -> int:
    """Blocks of a rank that these rows hold, shared ones once."""
    rows = [row for row in rows if rank in row.blocks]
    prompts = {id(row.shared): row.shared.blocks[rank] for row in rows}
    return sum(prompts.values()) + sum(row.blocks[rank] - row.shared.blocks[rank] for row in rows)


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of events: no rank ever needs more blocks than it has, and nothing is left behind."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = DecodeScheduler((6, 9), BLOCK, 64)
        self.rank = Ranks()
        self.known: dict[int, Row] = {}
        self.sequence = 0

    @rule(tokens=st.integers(1, 400), more=st.integers(1, 100), choices=st.integers(1, 3))
    def reserve(self, tokens: int, more: int, choices: int) -> None:
        try:
            rows = self.scheduler.reserve(tokens, more, choices)
        except (NoRoomError, NeverFitsError):
            return
        self.known.update({row.row_id: row for row in rows})

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

    @precondition(lambda self: self.scheduler.steps_in_flight > 0)
    @rule()
    def step_done(self) -> None:
        self.scheduler.step_done()

    @rule()
    def send_plans(self) -> None:
        for plan in drain(self.scheduler):
            self.sequence += 1
            assert plan.sequence == self.sequence
            skipped = set(plan.reserve) & set(plan.release)
            for row_id in set(plan.release) - skipped:
                del self.rank.blocks[row_id]
                self.rank.admitted.discard(row_id)
            for row_id in set(plan.reserve) - skipped:
                self.rank.blocks[row_id] = row_id
            for rank, total in enumerate(self.scheduler.blocks_total):
                assert held(rank, [self.known[row_id] for row_id in self.rank.blocks]) <= total

    @invariant()
    def blocks_are_counted(self) -> None:
        for rank, total in enumerate(self.scheduler.blocks_total):
            assert self.scheduler.free[rank] + held(rank, self.scheduler.rows.values()) == total
        assert 0 <= self.scheduler.steps_in_flight <= MAX_STEPS_IN_FLIGHT

    def teardown(self) -> None:
        for row_id in self.known:
            self.scheduler.release(row_id)
        while self.scheduler.steps_in_flight:
            self.scheduler.step_done()
        drain(self.scheduler)
        assert self.scheduler.free == list(self.scheduler.blocks_total)
        assert not self.scheduler.rows


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
