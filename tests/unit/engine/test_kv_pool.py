"""The arena, the block pool and slot runs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sps2_engine.kv_pool import BLOCK_TOKENS, BlockPool, KvArena, OutOfBlocksError, merge_runs, slot_runs


def test_the_arena_has_the_announced_shape() -> None:
    arena = KvArena(num_layers=3, num_blocks=5, num_kv_heads=2, head_dim=8, dtype=torch.bfloat16)
    assert arena.k.shape == arena.v.shape == (3, 5 * BLOCK_TOKENS, 2, 8)
    assert arena.k.dtype == torch.bfloat16
    assert arena.num_slots == 320
    assert arena.side_token_bytes == 2 * 8 * 2


def test_an_allocation_is_one_run_where_there_is_one() -> None:
    pool = BlockPool(10)
    first, second, third = pool.allocate(2), pool.allocate(3), pool.allocate(2)
    assert (first, second, third) == ([0, 1], [2, 3, 4], [5, 6])
    pool.free(first)
    pool.free(third)  # free now: 0-1, 5-9
    assert pool.allocate(4) == [5, 6, 7, 8]


def test_a_fragmented_pool_gives_its_longest_runs() -> None:
    pool = BlockPool(8)
    pool.allocate(8)
    pool.free([0, 2, 3, 5])
    assert pool.allocate(3) == [2, 3, 0]
    assert (pool.num_free, pool.num_used) == (1, 7)


def test_too_large_an_allocation_changes_nothing() -> None:
    pool = BlockPool(3)
    pool.allocate(1)
    with pytest.raises(OutOfBlocksError, match="3 KV blocks wanted, 2 free") as caught:
        pool.allocate(3)
    assert (caught.value.num_wanted, caught.value.num_free) == (3, 2)
    assert pool.num_free == 2
    pool.check()


@pytest.mark.parametrize("blocks", [[0, 0], [2], [0, 2], [-1], [3]])
def test_freeing_what_is_not_allocated_changes_nothing(blocks: list[int]) -> None:
    pool = BlockPool(3)
    pool.allocate(2)
    with pytest.raises(ValueError):
        pool.free(blocks)
    assert pool.num_used == 2
    pool.check()


def test_a_shared_block_is_free_when_its_last_owner_has_left() -> None:
    pool = BlockPool(4)
    first = pool.allocate(3)
    pool.share(first[:2])
    pool.free(first)
    assert (pool.num_used, pool.num_free) == (2, 2)
    pool.check()
    pool.free(first[:2])
    assert pool.num_free == 4
    pool.check()


@pytest.mark.parametrize("blocks", [[0, 0], [2], [0, 2]])
def test_sharing_what_is_not_allocated_changes_nothing(blocks: list[int]) -> None:
    pool = BlockPool(3)
    pool.allocate(2)
    with pytest.raises(ValueError):
        pool.share(blocks)
    pool.free([0, 1])
    assert pool.num_free == 3


def test_check_finds_a_broken_pool() -> None:
    pool = BlockPool(3)
    pool._owners[1] = 1
    with pytest.raises(AssertionError, match="free and used"):
        pool.check()


@pytest.mark.parametrize(
    ("blocks", "count", "first", "runs"),
    [
        ([3, 4, 7], 130, 0, [(192, 320), (448, 450)]),
        ([3, 4, 7], 130, 62, [(254, 320), (448, 512)]),
        ([1, 0], 128, 0, [(64, 128), (0, 64)]),
        ([5], 1, 63, [(383, 384)]),
        ([5], 0, 0, []),
    ],
)
def test_slot_runs(blocks: list[int], count: int, first: int, runs: list[tuple[int, int]]) -> None:
    assert slot_runs(blocks, count, first) == runs


@pytest.mark.parametrize(("count", "first"), [(65, 0), (1, 64), (-1, 0), (1, -1)])
def test_slot_runs_outside_the_blocks_are_refused(count: int, first: int) -> None:
    with pytest.raises(ValueError):
        slot_runs([0], count, first)


@given(
    blocks=st.lists(st.integers(0, 40), unique=True, min_size=1, max_size=12),
    data=st.data(),
)
def test_slot_runs_name_every_token_once_in_order(blocks: list[int], data: st.DataObject) -> None:
    capacity = len(blocks) * BLOCK_TOKENS
    first = data.draw(st.integers(0, capacity))
    count = data.draw(st.integers(0, capacity - first))
    runs = slot_runs(blocks, count, first)
    slots = [slot for begin, end in runs for slot in range(begin, end)]
    assert slots == [
        blocks[token // BLOCK_TOKENS] * BLOCK_TOKENS + token % BLOCK_TOKENS
        for token in range(first, first + count)
    ]
    assert merge_runs(runs) == runs
