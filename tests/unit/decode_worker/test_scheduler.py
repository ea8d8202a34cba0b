"""The pure decode scheduler: blocks, plans one step ahead, rows that leave, rows that must."""

import pytest

from sps2_decode_worker.placing import Asked
from sps2_decode_worker.scheduler import (
    MAX_STEPS_IN_FLIGHT,
    DecodeScheduler,
    NeverFitsError,
    NoRoomError,
    Plan,
)
from sps2_decode_worker.tenants import Row

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
    (row,) = scheduler.reserve(Asked(500, 8))
    assert drain(scheduler) == [Plan(1, (), (row.row_id,), (), run=False)]
    scheduler.admit(row.row_id)
    assert drain(scheduler) == [Plan(2, (), (), (row.row_id,), run=True), Plan(3, (), (), (), run=True)]
    assert scheduler.steps_in_flight == MAX_STEPS_IN_FLIGHT
    scheduler.step_done()
    assert drain(scheduler) == [Plan(4, (), (), (), run=True)]


def test_the_last_token_by_length_needs_no_step_beyond() -> None:
    """max_tokens 3: the first token is prefill's, two steps make the rest, the release follows by itself."""
    scheduler = make(10)
    (row,) = scheduler.reserve(Asked(10, 3))
    drain(scheduler)
    scheduler.admit(row.row_id)
    plans = drain(scheduler)
    assert [plan.run for plan in plans] == [True, True, False]
    assert plans[-1].release == (row.row_id,)
    assert scheduler.free == [10]


def test_a_prompt_is_spread_over_the_ranks_with_most_room() -> None:
    scheduler = make(10, 20, 20)
    (row,) = scheduler.reserve(Asked(300, 64))
    assert row.tenant.places.shards == {2: (0, 128), 1: (128, 300)}
    assert row.home == 1
    assert row.blocks == {1: 4, 2: 2}
    assert scheduler.free == [10, 16, 18]


def test_homes_are_spread() -> None:
    scheduler = make(100, 100)
    assert [scheduler.reserve(Asked(1000, 1))[0].home for _ in range(4)] == [0, 1, 0, 1]


def test_a_row_released_before_its_plan_went_out_costs_nothing() -> None:
    scheduler = make(10)
    (row,) = scheduler.reserve(Asked(100, 1))
    scheduler.release(row.row_id)
    (plan,) = drain(scheduler)
    assert plan.release == plan.reserve == (row.row_id,)
    assert scheduler.free == [10]


def test_no_room_now_is_told_from_never() -> None:
    scheduler = make(4)
    scheduler.reserve(Asked(100, 60))
    with pytest.raises(NoRoomError):
        scheduler.reserve(Asked(100, 60))
    with pytest.raises(NeverFitsError):
        scheduler.reserve(Asked(1000, 1))


def test_choices_share_what_they_do_not_write() -> None:
    """130 tokens are 2 full blocks and 2 tokens: each choice has a copy of the third, and 1 for its output."""
    scheduler = make(20)
    rows = scheduler.reserve(Asked(130, 64, 3))
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
    rows = scheduler.reserve(Asked(256, 1, 4))
    assert rows[0].tenant.places.shards == {1: (0, 128), 0: (128, 256)}
    assert scheduler.free == [10 - 2 - 4, 10 - 2]


def test_room_is_found_for_all_choices_or_none() -> None:
    scheduler = make(4)
    with pytest.raises(NeverFitsError):
        scheduler.reserve(Asked(10, 10, 5))
    assert scheduler.free == [4]
    scheduler.reserve(Asked(10, 10, 4))
    assert scheduler.free == [0]


def start(scheduler: DecodeScheduler, num_tokens: int, max_new: int, came: int = 0) -> Row:
    """A row that decodes from the next plan on."""
    (row,) = scheduler.reserve(Asked(num_tokens, max_new), came)
    scheduler.admit(row.row_id)
    return row


def step(scheduler: DecodeScheduler) -> Plan:
    """The next step's plan, done at once."""
    plan = scheduler.next_plan()
    assert plan is not None
    assert plan.run
    scheduler.step_done()
    return plan


def test_output_takes_its_blocks_as_it_comes() -> None:
    """40 tokens and 64 ahead are 2 blocks; the 88th new token is the last that fits them."""
    scheduler = make(10)
    row = start(scheduler, 40, 300)
    assert scheduler.free == [8]
    for _ in range(88):
        step(scheduler)
    assert (scheduler.free, row.blocks) == ([8], {0: 2})
    step(scheduler)
    assert (scheduler.free, row.blocks) == ([7], {0: 3})


def test_the_last_to_come_is_preempted() -> None:
    scheduler = make(7)
    first, second = (start(scheduler, 64, 300, came) for came in (1, 2))
    assert scheduler.free == [3]
    plans: list[Plan] = []
    while not plans or not plans[-1].preempted:
        plans.append(step(scheduler))
    assert plans[-1].preempted == plans[-1].release == (second.row_id,)
    assert list(scheduler.rows) == [first.row_id]
    assert (first.blocks, scheduler.free) == ({0: 4}, [3])
    while first.row_id in scheduler.rows:
        step(scheduler)
    assert drain(scheduler)[0].release == (first.row_id,)


def test_who_waits_for_kv_is_preempted_as_well() -> None:
    scheduler = make(5)
    first = start(scheduler, 64, 200, 1)
    (second,) = scheduler.reserve(Asked(60, 4), 2)
    while not (plan := step(scheduler)).preempted:
        assert scheduler.rows
    assert plan.preempted == (second.row_id,)
    assert first.row_id in scheduler.rows


def test_who_comes_back_takes_its_room_from_later_ones() -> None:
    scheduler = make(6)
    later = [start(scheduler, 64, 64, came) for came in (5, 6)]
    scheduler.reserve(Asked(100, 28), 4)
    step(scheduler)
    (row,) = scheduler.reserve(Asked(100, 28), 3)
    plan = step(scheduler)
    assert plan.preempted == plan.release == (later[1].row_id,)
    assert plan.reserve == (row.row_id,)
    with pytest.raises(NoRoomError):
        scheduler.reserve(Asked(64, 64), 6)


def test_who_is_more_urgent_comes_first() -> None:
    scheduler = make(2)
    (usual,) = scheduler.reserve(Asked(64, 64), 1)
    with pytest.raises(NoRoomError):
        scheduler.reserve(Asked(64, 64), 2)
    scheduler.reserve(Asked(64, 64), -1)
    assert usual.row_id not in scheduler.rows


def test_a_new_one_leaves_each_row_its_next_block() -> None:
    scheduler = make(5)
    start(scheduler, 64, 200, 1)
    scheduler.reserve(Asked(64, 64), 2)
    with pytest.raises(NoRoomError):
        scheduler.reserve(Asked(1, 1), 3)
    assert scheduler.free == [1]


def test_no_place_is_taken_in_which_the_output_could_never_end() -> None:
    scheduler = make(4, 9)
    (row,) = scheduler.reserve(Asked(64, 500), 1)
    assert row.home == 1
    scheduler.reserve(Asked(64, 192), 2)
    with pytest.raises(NoRoomError):
        scheduler.reserve(Asked(64, 500), 4)


def test_choices_are_preempted_together() -> None:
    scheduler = make(8)
    first = start(scheduler, 64, 300, 1)
    rows = scheduler.reserve(Asked(100, 64, 2), 2)
    assert scheduler.free == [8 - 2 - 1 - 2 * 2]
    while not (plan := step(scheduler)).preempted:
        assert first.row_id in scheduler.rows
    assert plan.preempted == tuple(row.row_id for row in rows)
