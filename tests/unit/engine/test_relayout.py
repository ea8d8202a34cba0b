"""Who sends which tokens and heads to whom, in which slabs."""

from itertools import pairwise

import pytest

from sps2.internal.v1.placement_pb2 import Placement, ShardPlacement
from sps2_engine.kv_transfer.relayout import Part, check_covers, cut, lanes, num_cells, shares
from sps2_engine.kv_transfer.rows import TensorSource, cut_rows, row_of, tensor_source
from sps2_layout.layout import Span

ALL = Span(0, 4)


def placement(*borders: int, heads: tuple[int, int] = (0, 0)) -> Placement:
    return Placement(
        shards=[
            ShardPlacement(
                rank=rank, token_begin=begin, token_end=end, head_begin=heads[0], head_end=heads[1]
            )
            for rank, (begin, end) in enumerate(pairwise(borders))
        ]
    )


def part(shard: int, begin: int, end: int, heads: Span = ALL) -> Part:
    return Part(shard, Span(begin, end), heads)


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([(0, 100)], [part(0, 0, 64), part(1, 64, 100)]),
        ([(64, 128)], [part(1, 64, 128)]),
        ([(30, 31)], [part(0, 30, 31)]),
        ([(100, 200)], [part(1, 100, 128), part(2, 128, 200)]),
        ([(10, 20), (60, 70)], [part(0, 10, 20), part(0, 60, 64), part(1, 64, 70)]),
        ([(50, 50)], []),
        ([], []),
    ],
)
def test_shares(spans: list[tuple[int, int]], expected: list[Part]) -> None:
    assert shares(placement(0, 64, 128, 200), [Span(*span) for span in spans], ALL, 4) == expected


def test_a_source_of_some_heads_sends_those() -> None:
    assert shares(placement(0, 64, 128), [Span(60, 70)], Span(1, 3), 4) == [
        part(0, 60, 64, Span(1, 3)),
        part(1, 64, 70, Span(1, 3)),
    ]


def test_targets_of_some_heads_get_what_both_have_and_each_replica_a_copy() -> None:
    lower, upper = placement(0, 64, 128, heads=(0, 2)), placement(0, 128, heads=(2, 4))
    both = Placement(shards=[*lower.shards, *upper.shards, *upper.shards])
    assert [(lane.heads, lane.first_shard) for lane in lanes(both, 4)] == [
        (Span(0, 2), 0),
        (Span(2, 4), 2),
        (Span(2, 4), 3),
    ]
    assert shares(both, [Span(60, 70)], Span(1, 4), 4) == [
        part(0, 60, 64, Span(1, 2)),
        part(1, 64, 70, Span(1, 2)),
        part(2, 60, 70, Span(2, 4)),
        part(3, 60, 70, Span(2, 4)),
    ]


def test_what_nobody_takes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"does not take tokens \[200, 201\)"):
        shares(placement(0, 64, 200), [Span(100, 201)], ALL, 4)
    with pytest.raises(ValueError, match=r"does not take heads \[0, 1, 2, 3\]"):
        shares(Placement(), [Span(0, 10)], ALL, 4)
    with pytest.raises(ValueError, match=r"does not take heads \[0, 3\]"):
        shares(placement(0, 64, heads=(1, 3)), [Span(0, 10)], ALL, 4)


def test_a_gap_in_the_placement_is_refused() -> None:
    broken = placement(0, 64, 200)
    broken.shards[1].token_begin = 128
    with pytest.raises(ValueError, match="shard 1 begins at token 128"):
        shares(broken, [Span(0, 10)], ALL, 4)


def test_a_placement_covers_every_head_of_every_token() -> None:
    halves = Placement(
        shards=[*placement(0, 64, 200, heads=(0, 2)).shards, *placement(0, 200, heads=(2, 4)).shards]
    )
    check_covers(halves, 200, 4)
    with pytest.raises(ValueError, match=r"no shard holds heads \[4\]"):
        check_covers(halves, 200, 5)
    with pytest.raises(ValueError, match="must cover the prompt"):
        check_covers(halves, 201, 4)
    with pytest.raises(ValueError, match="must cover the prompt"):
        check_covers(Placement(), 200, 4)


@pytest.mark.parametrize("heads", [(0, 5), (2, 1), (4, 4), (-1, 2)])
def test_heads_that_the_model_lacks_are_refused(heads: tuple[int, int]) -> None:
    with pytest.raises(ValueError):
        shares(placement(0, 64, heads=heads), [Span(0, 10)], ALL, 4)


def test_spans_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="not in order"):
        shares(placement(0, 64), [Span(10, 20), Span(5, 8)], ALL, 4)


def test_slabs_are_few_and_of_nearly_equal_size() -> None:
    assert cut(part(3, 10, 15), head_bytes=1, max_slab_bytes=17) == [part(3, 10, 12), part(3, 12, 15)]
    assert cut(part(0, 0, 4), head_bytes=1, max_slab_bytes=16) == [part(0, 0, 4)]
    half = part(0, 0, 8, Span(2, 4))
    assert cut(half, head_bytes=1, max_slab_bytes=16) == [half]


def test_a_token_larger_than_a_slab_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        cut(part(0, 0, 4), head_bytes=5, max_slab_bytes=16)


def test_cells_are_tokens_by_heads() -> None:
    assert num_cells([part(0, 0, 3), part(1, 3, 4, Span(1, 2))]) == 13


def test_nothing_is_no_part() -> None:
    with pytest.raises(ValueError):
        part(0, 4, 4)
    with pytest.raises(ValueError):
        part(0, 4, 5, Span(2, 2))


def test_tensor_ranks_send_their_own_heads_or_split_the_tokens_of_one() -> None:
    assert [tensor_source(8, rank, 4).heads for rank in range(4)] == [
        Span(0, 2),
        Span(2, 4),
        Span(4, 6),
        Span(6, 8),
    ]
    assert [tensor_source(2, rank, 4) for rank in range(4)] == [
        TensorSource(Span(0, 1), 0, 2),
        TensorSource(Span(0, 1), 1, 2),
        TensorSource(Span(1, 2), 0, 2),
        TensorSource(Span(1, 2), 1, 2),
    ]
    assert [tensor_source(2, rank, 4).rows(5) for rank in (0, 1)] == [Span(0, 2), Span(2, 5)]
    with pytest.raises(ValueError, match="no tensor rank 4 of 4"):
        tensor_source(8, 4, 4)


def test_rows_count_the_tokens_of_the_spans_one_after_another() -> None:
    spans = [Span(10, 20), Span(60, 70)]
    assert [row_of(spans, token) for token in (10, 19, 60, 69)] == [0, 9, 10, 19]
    with pytest.raises(ValueError, match="token 30"):
        row_of(spans, 30)
    assert cut_rows(spans, Span(8, 13)) == [Span(18, 20), Span(60, 63)]
    assert cut_rows(spans, Span(10, 20)) == [Span(60, 70)]
    assert cut_rows(spans, Span(4, 4)) == []
