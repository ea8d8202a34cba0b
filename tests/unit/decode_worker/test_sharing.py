"""Prompts that begin alike: what is taken over, who is counted for it, when it is free."""

import pytest

from sps2_decode_worker.placing import Asked
from sps2_decode_worker.resizing import NotMovableError
from sps2_decode_worker.scheduler import DecodeScheduler, NoRoomError
from sps2_decode_worker.sharing import NO_PREFIX, HeldBlocks, Prefix, PromptBlocks, Run, num_freed, num_used
from sps2_decode_worker.tenants import Row
from sps2_layout.attention import Attention
from sps2_layout.profiles import DEFAULT

BLOCK = 64


def prefix(*families: int, mask: Attention | None = None) -> Prefix:
    """One chain hash for each block: a block's number, and those before it."""
    return Prefix(mask, tuple(bytes(families[: end + 1]) for end in range(len(families))))


ALIKE = prefix(1, 2, 3, 4, 5)


def make(*blocks: int) -> DecodeScheduler:
    return DecodeScheduler(blocks, BLOCK, 128)


def joined(held: list[Run], *new: HeldBlocks) -> PromptBlocks:
    """Those of an attempt that has come."""
    blocks = PromptBlocks.of(ALIKE, held, new)
    blocks.join()
    return blocks


def start(
    scheduler: DecodeScheduler, num_tokens: int, prompt: Prefix, came: int = 0, max_new: int = 64
) -> Row:
    """A row that decodes: its prompt is there."""
    (row,) = scheduler.reserve(Asked(num_tokens, max_new, prefix=prompt), came)
    scheduler.admit(row.row_id)
    return row


def test_common_blocks_end_where_the_first_differs() -> None:
    assert ALIKE.num_common(ALIKE) == 5
    assert ALIKE.num_common(prefix(1, 2, 9, 4, 5)) == 2
    assert ALIKE.num_common(prefix(1, 2)) == prefix(1, 2).num_common(ALIKE) == 2
    assert ALIKE.num_common(prefix(9)) == ALIKE.num_common(NO_PREFIX) == 0


def test_blocks_made_under_different_masks_are_different() -> None:
    """A CSA mask depends on the prompt's length; dense KV does not."""
    shorter, longer = (Attention.admit(DEFAULT, num_tokens) for num_tokens in (8_000, 9_000))
    assert prefix(1, 2, mask=shorter).num_common(prefix(1, 2, mask=shorter)) == 2
    assert prefix(1, 2, mask=shorter).num_common(prefix(1, 2, mask=longer)) == 0
    assert prefix(1, 2, mask=shorter).num_common(prefix(1, 2)) == 0


def test_runs_are_cut_for_all_of_their_users() -> None:
    first = joined([], HeldBlocks(0, 3), HeldBlocks(1, 3))
    second = joined(first.first(4), HeldBlocks(0, 2))
    third = joined(second.first(2))
    assert first.where(6) == (HeldBlocks(0, 3), HeldBlocks(1, 3))
    assert second.where(5) == (HeldBlocks(0, 3), HeldBlocks(1, 1), HeldBlocks(0, 1))
    assert third.where(9) == (HeldBlocks(0, 2),)
    assert num_used([first, second, third], 2) == [5, 3]
    assert [num_freed([one], 0) for one in (first, second, third)] == [0, 2, 0]
    assert num_freed([first, second], 0) == 3
    assert num_freed([first, second, third], 0) == 5
    first.leave()
    assert num_used([second, third], 2) == [5, 1]
    third.leave()
    assert not second.is_shared
    assert [num_freed([second], rank) for rank in (0, 1)] == [5, 1]


def test_who_comes_in_vain_uses_nothing() -> None:
    """An attempt that finds room, but may not pass the first in line."""
    first = joined([], HeldBlocks(0, 3))
    PromptBlocks.of(ALIKE, first.first(2), [HeldBlocks(0, 2)])
    assert not first.is_shared
    assert num_freed([first], 0) == 3


def test_what_has_moved_has_no_names() -> None:
    """A rank's blocks of it are no more in the order of the prompt: nobody may take "its first" there."""
    first = joined([], HeldBlocks(0, 3), HeldBlocks(1, 3))
    first.move([HeldBlocks(0, 1), HeldBlocks(1, 0), HeldBlocks(2, 5)])
    assert num_used([first], 3) == [1, 0, 5]
    assert first.prefix.num_common(ALIKE) == 0


def test_a_later_prompt_takes_over_what_it_has_in_common() -> None:
    scheduler = make(40)
    first = start(scheduler, 5 * BLOCK + 7, ALIKE)
    assert scheduler.free == [40 - 7]
    second = start(scheduler, 4 * BLOCK + 9, prefix(1, 2, 3, 9))
    assert second.tenant.places.held == (HeldBlocks(0, 3),)
    assert second.tenant.places.shards == {0: (3 * BLOCK, 4 * BLOCK + 9)}
    assert (second.tenant.held_from, second.blocks) == (first.row_id, {0: 6})
    assert scheduler.free == [40 - 7 - 3]
    assert [row.tenant.prompt.is_shared for row in (first, second)] == [True, True]
    scheduler.release(first.row_id)
    assert scheduler.free == [40 - 6]
    assert not second.tenant.prompt.is_shared
    third = start(scheduler, 3 * BLOCK + 1, prefix(1, 2, 3))
    assert third.tenant.held_from == second.row_id
    assert scheduler.free == [40 - 6 - 2]
    for row in (second, third):
        scheduler.release(row.row_id)
    assert scheduler.free == [40]


def test_all_of_a_prompt_may_be_there() -> None:
    scheduler = make(40, 40)
    first = start(scheduler, 5 * BLOCK, ALIKE)
    free = list(scheduler.free)
    second = start(scheduler, 5 * BLOCK, ALIKE)
    assert second.tenant.places.shards == {}
    assert second.tenant.places.holders == first.tenant.places.holders
    assert second.home in second.tenant.places.holders
    assert sum(scheduler.free) == sum(free) - 1  # for its output
    assert second.blocks[second.home] == second.tenant.blocks_at_home(64)


def test_what_is_still_arriving_is_not_taken_over() -> None:
    scheduler = make(40)
    (first,) = scheduler.reserve(Asked(5 * BLOCK, 64, prefix=ALIKE))
    (second,) = scheduler.reserve(Asked(5 * BLOCK, 64, prefix=ALIKE))
    assert second.tenant.places.held == ()
    scheduler.admit(first.row_id)
    assert start(scheduler, 5 * BLOCK, ALIKE).tenant.held_from == first.row_id


def test_a_few_tokens_do_not_bind_a_row_to_a_rank() -> None:
    """On one rank a block is worth taking over; on two, it is if a holder would be taken for as much."""
    for blocks, num_shared in [((40,), 1), ((40, 40), 0)]:
        scheduler = make(*blocks)
        start(scheduler, 100, prefix(1))
        assert (
            sum(one.num_blocks for one in start(scheduler, 100, prefix(1)).tenant.places.held) == num_shared
        )


def test_what_follows_goes_where_most_room_is() -> None:
    scheduler = make(40, 50)
    first = start(scheduler, 128 + 10, prefix(1, 2))
    assert first.home == 1
    start(scheduler, 20 * BLOCK, prefix(7, *range(19)))
    while scheduler.free[1] >= scheduler.free[0]:
        start(scheduler, 10, NO_PREFIX)
    second = start(scheduler, 128 + 100, prefix(1, 2, 3))
    assert second.tenant.places.held == (HeldBlocks(1, 2),)
    assert second.tenant.places.shards == {0: (128, 228)}
    assert second.home == 0


def test_where_shared_blocks_leave_no_room_it_brings_its_own() -> None:
    """All of the prompt lies on rank 0, which is full: a row there would have no block for its output."""
    scheduler = make(8, 8)
    start(scheduler, 128, prefix(1, 2))
    others = []
    while scheduler.free[0]:
        others += scheduler.reserve(Asked(1, 1))
    for row in others:
        if row.home == 1:
            scheduler.release(row.row_id)
    (row,) = scheduler.reserve(Asked(128, 64, prefix=prefix(1, 2)))
    assert (row.tenant.places.held, row.home) == ((), 1)


def test_who_stays_for_it_is_not_preempted_for_it() -> None:
    """The one whose blocks are taken over came last; it is the one before it that must leave, or nobody."""
    scheduler = make(12)
    donor = start(scheduler, 5 * BLOCK, ALIKE, came=9)
    other = start(scheduler, 3 * BLOCK, prefix(8, 8, 8), came=8)
    assert scheduler.free == [2]
    (row,) = scheduler.reserve(Asked(5 * BLOCK, 64, prefix=ALIKE), 1)
    assert row.tenant.held_from == donor.row_id
    assert scheduler.free == [1]
    scheduler.reserve(Asked(4 * BLOCK, 64, prefix=prefix(6, 6, 6, 6)), 1)
    assert donor.row_id not in scheduler.rows
    assert row.row_id in scheduler.rows
    assert other.row_id not in scheduler.rows
    assert scheduler.free == [12 - 6 - 5]


def test_who_frees_nothing_is_not_preempted() -> None:
    """On the rank that runs out the last attempt has only blocks that another one uses as well."""
    scheduler = make(9, 9)
    donor = start(scheduler, 128, prefix(1, 2))
    scheduler.reserve(Asked(200, 1))
    growing = start(scheduler, 64, NO_PREFIX, came=1, max_new=500)
    (sharing,) = scheduler.reserve(Asked(130, 4, prefix=prefix(1, 2)), 2)
    scheduler.reserve(Asked(1, 1))
    (victim,) = scheduler.reserve(Asked(1, 1), 3)
    (last,) = scheduler.reserve(Asked(130, 4, prefix=prefix(1, 2)), 4)
    assert [row.home for row in (growing, sharing, victim, last)] == [0, 1, 0, 1]
    assert [row.tenant.held(0) for row in (sharing, last)] == [2, 2]
    scheduler.release(donor.row_id)
    preempted: tuple[int, ...] = ()
    while not preempted:
        plan = scheduler.next_plan()
        assert plan is not None
        assert plan.run
        scheduler.step_done()
        preempted = plan.preempted
    assert preempted == (victim.row_id,)


def test_nobody_fits_where_even_shared_blocks_leave_no_room() -> None:
    scheduler = make(6)
    start(scheduler, 5 * BLOCK, ALIKE)
    with pytest.raises(NoRoomError):
        scheduler.reserve(Asked(5 * BLOCK, 64, prefix=ALIKE), 1)


def test_who_shares_does_not_move() -> None:
    """Neither for somebody who asks nor for room; when the other has left it may, and gives nothing away then."""
    scheduler = make(40, 40)
    first, second = start(scheduler, 5 * BLOCK, ALIKE), start(scheduler, 5 * BLOCK + 1, ALIKE)
    assert second.tenant.places.held
    for row in (first, second):
        with pytest.raises(NotMovableError, match="other requests use its prompt's KV"):
            scheduler.resize(row.row_id, 1)
    scheduler.release(first.row_id)
    home, other = second.home, 1 - second.home
    num_free = sum(scheduler.free)
    assert scheduler.resize(second.row_id, 1, (home,))
    meanwhile = start(scheduler, 5 * BLOCK, ALIKE)
    assert meanwhile.tenant.places.held == ()
    scheduler.release(meanwhile.row_id)
    while second.tenant.resize:
        assert scheduler.next_plan()
        scheduler.step_done()
    assert (scheduler.free[other], sum(scheduler.free)) == (40, num_free)
    later = start(scheduler, 5 * BLOCK, ALIKE)
    assert later.tenant.places.held == ()
    for row in (second, later):
        scheduler.release(row.row_id)
    assert scheduler.free == [40, 40]
