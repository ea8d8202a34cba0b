"""Which blocks move when holders change, or when a rank runs low."""

import pytest

from sps2_decode_worker.placing import Asked
from sps2_decode_worker.resizing import NotMovableError
from sps2_decode_worker.scheduler import DecodeScheduler, NoRoomError, Plan
from sps2_decode_worker.spread import Move, Spread, TooShortError, even_moves
from sps2_decode_worker.tenants import Row

BLOCK = 64


def spread_of(home: int, open_begin: int, **prompt: tuple[int, int]) -> Spread:
    """With runs of the prompt by rank, r0=..., and a home that grows from `open_begin` on."""
    runs = {int(rank[1:]): (run,) for rank, run in prompt.items()}
    return Spread(home, runs, {}, open_begin, BLOCK, movable=True)


def test_a_wider_spread_takes_the_front_of_home() -> None:
    spread = spread_of(0, 640, r0=(0, 640))
    moves = even_moves(spread, range(4), 650)
    assert moves == (Move(0, 1, 3, 0), Move(0, 2, 3, 0), Move(0, 3, 2, 0))
    for move in moves:
        spread = spread.after(move)
    assert spread.prompt == {0: ((512, 640),), 1: ((0, 192),), 2: ((192, 384),), 3: ((384, 512),)}
    assert spread.holders == (0, 1, 2, 3)
    assert spread.tokens_on(0, 650) == ((512, 650),)


def test_a_narrower_one_brings_home_what_others_hold() -> None:
    spread = spread_of(1, 256, r0=(0, 128), r1=(128, 256))
    (move,) = even_moves(spread, [1], 300)
    assert move == Move(0, 1, 2, 0)
    assert spread.after(move).holders == (1,)
    assert spread.after(move).tokens_on(1, 300) == ((0, 300),)


def test_output_moves_behind_the_prompt_but_never_the_block_that_grows() -> None:
    spread = spread_of(0, 64, r0=(0, 64))
    (move,) = even_moves(spread, [0, 1], 64 * 4 + 5)
    assert move == Move(0, 1, 1, 1)
    assert spread.after(move).open_begin == 128
    with pytest.raises(TooShortError):
        even_moves(spread, range(3), 70)


def test_another_home_takes_the_block_that_grows() -> None:
    spread = spread_of(0, 64, r0=(0, 64)).handed_over(1, 128)
    assert (spread.home, spread.open_begin, spread.holders) == (1, 64, (0, 1))
    spread = spread_of(0, 64, r0=(0, 64)).handed_over(1, 129)
    assert (spread.open_begin, spread.own[0]) == (128, ((64, 128),))


def started(scheduler: DecodeScheduler, num_tokens: int, max_new: int, turn: int = 0) -> Row:
    """A row that has decoded a token."""
    (row,) = scheduler.reserve(Asked(num_tokens, max_new), turn)
    scheduler.admit(row.row_id)
    step(scheduler)
    return row


def step(scheduler: DecodeScheduler) -> Plan:
    """The next step's plan, done at once."""
    plan = scheduler.next_plan()
    assert plan is not None
    scheduler.step_done()
    return plan


def test_a_few_blocks_go_with_each_step_and_their_room_is_promised_at_once() -> None:
    scheduler = DecodeScheduler((30, 30), BLOCK, 10_000, blocks_per_plan=4)
    row = started(scheduler, 12 * BLOCK, 64)
    assert scheduler.free == [17, 30]
    assert scheduler.resize(row.row_id, 2)
    assert scheduler.free == [17, 24]
    with pytest.raises(NotMovableError, match="under way"):
        scheduler.resize(row.row_id, 1)
    plans = [step(scheduler) for _ in range(3)]
    assert [[one.moves for one in plan.moves] for plan in plans] == [
        [(Move(0, 1, 4, 0),)],
        [(Move(0, 1, 2, 0),)],
        [],
    ]
    assert [plan.blocks_used for plan in plans] == [(9, 4), (7, 6), (7, 6)]
    assert [one.last for plan in plans for one in plan.moves] == [False, True]
    assert (row.blocks, scheduler.free) == ({0: 7, 1: 6}, [23, 24])
    assert (scheduler.num_resizes, scheduler.num_blocks_moved) == (1, 6)
    assert not scheduler.resize(row.row_id, 2)


def test_an_attempt_that_leaves_gives_back_what_was_promised() -> None:
    scheduler = DecodeScheduler((30, 30), BLOCK, 10_000, blocks_per_plan=4)
    row = started(scheduler, 12 * BLOCK, 64)
    scheduler.resize(row.row_id, 1, (1,))
    step(scheduler)
    assert row.home == 1
    scheduler.release(row.row_id)
    assert scheduler.free == [30, 30]


def test_no_resize_to_where_there_is_no_room() -> None:
    scheduler = DecodeScheduler((30, 5), BLOCK, 10_000)
    row = started(scheduler, 12 * BLOCK, 64)
    with pytest.raises(NoRoomError):
        scheduler.resize(row.row_id, 2)


def test_blocks_move_before_anybody_is_preempted() -> None:
    """Two rows grow to 8 blocks each on a rank of 12; the other has room for what they lack."""
    scheduler = DecodeScheduler((12, 6), BLOCK, 10_000)
    rows = [started(scheduler, 4 * BLOCK, 4 * BLOCK, turn) for turn in (1, 2)]
    assert [row.home for row in rows] == [0, 0]
    plans = [step(scheduler) for _ in range(4 * BLOCK - 3)]
    assert not any(plan.preempted for plan in plans)
    assert any(plan.moves for plan in plans)
