"""Who sends which tokens to whom, in which slabs."""

from itertools import pairwise

import pytest

from sps2.internal.v1.placement_pb2 import Placement, ShardPlacement
from sps2_engine.kv_transfer.relayout import TokenRange, cut, shares, transfer_bytes


def placement(*borders: int) -> Placement:
    return Placement(
        shards=[
            ShardPlacement(rank=rank, token_begin=begin, token_end=end)
            for rank, (begin, end) in enumerate(pairwise(borders))
        ]
    )


@pytest.mark.parametrize(
    ("begin", "end", "expected"),
    [
        (0, 100, [TokenRange(0, 0, 64), TokenRange(1, 64, 100)]),
        (64, 128, [TokenRange(1, 64, 128)]),
        (30, 31, [TokenRange(0, 30, 31)]),
        (100, 200, [TokenRange(1, 100, 128), TokenRange(2, 128, 200)]),
        (50, 50, []),
    ],
)
def test_shares(begin: int, end: int, expected: list[TokenRange]) -> None:
    assert shares(placement(0, 64, 128, 200), begin, end) == expected


def test_tokens_that_nobody_takes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"does not take tokens \[200, 201\)"):
        shares(placement(0, 64, 200), 100, 201)
    with pytest.raises(ValueError, match=r"does not take tokens \[0, 10\)"):
        shares(Placement(), 0, 10)


def test_a_gap_in_the_placement_is_refused() -> None:
    broken = placement(0, 64, 200)
    broken.shards[1].token_begin = 128
    with pytest.raises(ValueError, match="shard 1 begins at token 128"):
        shares(broken, 0, 10)


def test_slabs_are_few_and_of_nearly_equal_size() -> None:
    assert cut(TokenRange(3, 10, 15), token_bytes=4, max_slab_bytes=17) == [
        TokenRange(3, 10, 12),
        TokenRange(3, 12, 15),
    ]
    assert cut(TokenRange(0, 0, 4), token_bytes=4, max_slab_bytes=16) == [TokenRange(0, 0, 4)]


def test_a_token_larger_than_a_slab_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        cut(TokenRange(0, 0, 4), token_bytes=20, max_slab_bytes=16)


def test_transfer_bytes() -> None:
    assert transfer_bytes([TokenRange(0, 0, 3), TokenRange(1, 3, 4)], num_layers=2, token_bytes=10) == 80


def test_an_empty_range_is_no_range() -> None:
    with pytest.raises(ValueError):
        TokenRange(0, 4, 4)
