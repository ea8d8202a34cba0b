"""Slices: every rank ends equally many in every stage, none is much longer than it may be, results stay."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sps2_engine.attention.sliced import segment_flops, sliced_attention
from sps2_engine.slices import Slicer
from sps2_kernels.segment_attention import UNMASKED, segment_attention

STAGES = st.lists(st.tuples(st.integers(0, 50), st.lists(st.integers(0, 50), max_size=6)), max_size=8)


@given(st.integers(1, 30), STAGES)
def test_ranks_of_unequal_work_end_equally_many_slices(
    slice_flops: int, stages: list[tuple[int, list[int]]]
) -> None:
    """One rank has the pieces drawn, another more work, a third none."""
    ends: list[list[int]] = [[], [], []]
    slicers = [Slicer(slice_flops, lambda mine=mine: mine.append(1)) for mine in ends]  # type: ignore[misc]
    for extra, pieces in stages:
        most = sum(pieces) + extra
        for slicer, work in zip(slicers, (pieces, [*pieces, extra], []), strict=True):
            with slicer.stage(most, sum(work)) as stage:
                for piece in work:
                    stage.spend(piece)
        assert len({len(mine) for mine in ends}) == 1
    total = sum(extra + sum(pieces) for extra, pieces in stages)
    assert len(ends[0]) == total // slice_flops


def test_the_busiest_rank_ends_a_slice_as_soon_as_it_is_over() -> None:
    ended: list[int] = []
    slicer, done = Slicer(100, lambda: ended.append(done)), 0
    with slicer.stage(1000, 1000) as stage:
        for _ in range(20):
            done += 50
            stage.spend(50)
    assert ended == list(range(100, 1001, 100))


def test_rows_are_cut_alike_and_cover_all() -> None:
    for num_rows in (0, 1, 700, 5000):
        ends: list[int] = []
        slices = list(Slicer(10_000, lambda ends=ends: ends.append(1)).rows(5000, num_rows, 100))  # type: ignore[misc]
        assert len(ends) == 50
        assert [row for rows in slices for row in range(rows.start, rows.stop)] == list(range(num_rows))
        assert all(rows.stop - rows.start <= 100 for rows in slices)


def test_what_the_end_of_a_slice_raises_ends_the_work() -> None:
    def stop() -> None:
        raise InterruptedError

    rows = Slicer(1000, stop).rows(100, 100, 100)
    assert next(rows) == slice(0, 10)
    with pytest.raises(InterruptedError):
        next(rows)


def test_nothing_is_cut_without_an_end() -> None:
    assert list(Slicer.endless().rows(10, 10, 1 << 40)) == [slice(0, 10)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (14, 2), (6, 6)])
@pytest.mark.parametrize("piece_flops", [1, 300_000, 2_000_000, 20_000_000, 1 << 62])
def test_pieces_are_the_whole(causal: bool, heads: tuple[int, int], piece_flops: int) -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(210, heads[0], 8, generator=generator)
    k, v = (torch.randn(210 if causal else 333, heads[1], 8, generator=generator) for _ in range(2))
    ended = []
    whole = segment_flops(len(q), len(k), heads[0], 8, causal=causal)
    slicer = Slicer(max(1, whole // 10), lambda: ended.append(1))
    with slicer.stage(whole, whole) as stage:
        o, lse = sliced_attention(q, k, v, 0.3, causal=causal, piece_flops=piece_flops, stage=stage)
        assert stage.spent == whole
    expected = segment_attention(q, k, v, 0 if causal else UNMASKED, 0.3)
    torch.testing.assert_close((o, lse), expected, atol=2e-6, rtol=1e-5)
    assert len(ended) == whole // slicer.slice_flops
