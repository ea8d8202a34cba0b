"""Paged decode: interpreter == CPU form == fp64 reference, over splits, page edges, heads and empty rows."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sps2_engine.kv_pool import BLOCK_TOKENS, slot_runs
from sps2_kernels import reference
from sps2_kernels.paged_decode import (
    PAGE_TOKENS,
    PagedRows,
    SlotRuns,
    paged_decode_partial,
    paged_decode_partial_cpu,
)
from sps2_kernels.shape import HEAD_DIMS
from support.address_space import vast
from support.triton_interpreter import assert_near, interpreted_form

CPU = torch.device("cpu")
NUM_PAGES = 12
PAGED: tuple[SlotRuns, ...] = (
    [(64, 65)],  # one key
    [],  # none
    [(128, 256), (0, 64), (320, 351)],  # out of order, the last page in part
    [(512, 768)],  # whole pages
)
"""Rows of a cache of 12 pages, as a pool would hand them out."""


def draw(
    num_rows: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    q = torch.randn(num_rows, heads[0], head_dim, generator=generator).to(dtype)
    k, v = torch.randn(2, NUM_PAGES * PAGE_TOKENS, heads[1], head_dim, generator=generator).to(dtype)
    return q, k, v


def check(q: Tensor, k: Tensor, v: Tensor, runs: tuple[SlotRuns, ...], splits: int | None = None) -> None:
    scale = q.shape[2] ** -0.5
    slots = [[slot for begin, end in row for slot in range(begin, end)] for row in runs]
    expected_o, expected_lse = reference.paged_decode_partial(q, k, v, slots, scale)
    rows = PagedRows(runs, CPU)
    triton_form = interpreted_form("paged_decode").paged_decode_partial
    for o, lse in (
        paged_decode_partial_cpu(q, k, v, rows, scale),
        triton_form(q, k, v, rows, scale, splits),
    ):
        assert (o.dtype, lse.dtype, o.shape, lse.shape) == (q.dtype, torch.float32, q.shape, q.shape[:2])
        assert_near(o, expected_o, q.dtype)
        assert_near(lse, expected_lse, q.dtype)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_configuration(dtype: torch.dtype, head_dim: int, splits: int) -> None:
    check(*draw(2, (2, 1), head_dim, dtype), (PAGED[1], PAGED[2]), splits)


@pytest.mark.parametrize("splits", [None, 2, 16])
def test_rows_of_all_kinds(splits: int | None) -> None:
    check(*draw(len(PAGED), (4, 2), 32, torch.float32), PAGED, splits)


@pytest.mark.parametrize("heads", [(3, 3), (20, 1), (6, 2)])
def test_grouped_heads(heads: tuple[int, int]) -> None:
    check(*draw(1, heads, 32, torch.float32), ([(64, 150)],))


@pytest.mark.parametrize("num_keys", [1, 63, 64, 65, 128])
def test_page_edges(num_keys: int) -> None:
    check(*draw(1, (2, 1), 32, torch.float32), ([(192, 192 + num_keys)],), 2)


def test_no_rows() -> None:
    q, k, v = draw(0, (2, 1), 32, torch.float32)
    for form in (paged_decode_partial_cpu, interpreted_form("paged_decode").paged_decode_partial):
        o, lse = form(q, k, v, PagedRows((), CPU), 0.2)
        assert (o.shape, lse.shape) == (q.shape, (0, 2))


def test_a_slot_that_a_row_does_not_see_changes_no_bit() -> None:
    form = interpreted_form("paged_decode").paged_decode_partial
    q, k, v = draw(1, (2, 1), 32, torch.float32)
    rows = PagedRows(([(64, 100)],), CPU)
    before = form(q, k, v, rows, 0.2)
    k[100:] = math.nan  # what nobody has written yet may hold anything
    v[100:] = math.nan
    k[:64] = math.nan
    assert all(torch.equal(a, b) for a, b in zip(form(q, k, v, rows, 0.2), before, strict=True))


def test_slots_beyond_two_to_the_31() -> None:
    """The same keys in the first pages of a cache and in pages whose elements lie past 2^31."""
    q, near_k, near_v = draw(2, (2, 1), 32, torch.bfloat16)
    first = (1 << 31) // 32 + 128
    k, v = (vast((first + len(near_k)) * 32, torch.bfloat16).view(-1, 1, 32) for _ in range(2))
    k[first:], v[first:] = near_k, near_v
    near: tuple[SlotRuns, ...] = ([(0, 128)], [(64, 100)])
    far = tuple([(first + begin, first + end) for begin, end in row] for row in near)
    form = interpreted_form("paged_decode").paged_decode_partial
    expected = form(q, near_k, near_v, PagedRows(near, CPU), 0.2, 2)
    found = form(q, k, v, PagedRows(far, CPU), 0.2, 2)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_block_table_and_lengths() -> None:
    rows = PagedRows(PAGED, CPU)
    assert rows.kv_len.tolist() == [1, 0, 223, 256]
    assert rows.block_table[:, :4].tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [2, 3, 0, 5], [8, 9, 10, 11]]
    assert not rows.block_table[:, 4:].any()
    assert (rows.kv_len.dtype, rows.block_table.dtype, rows.max_len) == (torch.int32, torch.int32, 256)


@pytest.mark.parametrize("runs", [[(1, 64)], [(0, 63), (64, 128)]])
def test_runs_that_are_not_pages_have_no_table(runs: SlotRuns) -> None:
    with pytest.raises(ValueError, match="not whole pages"):
        _ = PagedRows((runs,), CPU).block_table


def test_rows_must_match_queries() -> None:
    q, k, v = draw(2, (2, 1), 32, torch.float32)
    with pytest.raises(ValueError, match="2 queries"):
        paged_decode_partial(q, k, v, PagedRows((), CPU), 1.0)


@pytest.mark.parametrize(
    ("num_rows", "num_kv_heads", "max_len", "expected"),
    [(1, 8, 100, 1), (1, 8, 8192, 16), (1, 1, 1 << 20, 64), (200, 8, 8192, 1)],
)
def test_splits_fill_the_device(num_rows: int, num_kv_heads: int, max_len: int, expected: int) -> None:
    assert interpreted_form("paged_decode").num_splits(num_rows, num_kv_heads, max_len) == expected


def test_a_page_is_the_engines_block() -> None:
    assert PAGE_TOKENS == BLOCK_TOKENS


@given(st.data())
def test_tables_grown_in_place_are_those_of_a_rebuild(data: st.DataObject) -> None:
    pages = data.draw(st.permutations(range(12)))
    lens = data.draw(st.lists(st.integers(0, 3 * PAGE_TOKENS), min_size=1, max_size=4))
    runs = [slot_runs(pages[3 * row : 3 * row + 3], count) for row, count in enumerate(lens)]
    rows = PagedRows(runs, CPU)
    if data.draw(st.booleans()):
        _ = rows.block_table  # made before the first step, or after some
    for _step in range(data.draw(st.integers(1, 70))):
        ended = data.draw(st.integers(0, len(lens)))  # the first rows stay as they are
        for row in range(ended, len(lens)):
            lens[row] = min(lens[row] + 1, 3 * PAGE_TOKENS)
        if not all(lens):
            lens = [max(1, count) for count in lens]  # a row that takes a slot has a key
        rows.append([pages[3 * row + (n - 1) // 64] * 64 + (n - 1) % 64 for row, n in enumerate(lens)])
    rebuilt = PagedRows([slot_runs(pages[3 * row : 3 * row + 3], n) for row, n in enumerate(lens)], CPU)
    width = min(rows.block_table.shape[1], rebuilt.block_table.shape[1])
    assert [list(one) for one in rows.runs] == [list(one) for one in rebuilt.runs]
    assert rows.kv_len.tolist() == rebuilt.kv_len.tolist() == lens
    assert rows.max_len == rebuilt.max_len
    assert torch.equal(rows.block_table[:, :width], rebuilt.block_table[:, :width])
    assert not rows.block_table[:, width:].any()
