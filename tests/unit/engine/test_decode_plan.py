"""The pure decode plan: placement and bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sps2_engine.attention.decode_plan import DecodePlan, DecodeRow, choose_holders, place_tokens


@given(st.integers(1, 100_000), st.integers(1, 8), st.integers(1, 1000))
def test_placement_covers_the_prompt_by_whole_blocks(
    num_tokens: int, max_holders: int, min_tokens: int
) -> None:
    ranges = place_tokens(num_tokens, 64, max_holders, min_tokens)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == num_tokens
    assert 1 <= len(ranges) <= max_holders
    for (begin, end), following in zip(ranges, [*ranges[1:], (num_tokens, 0)], strict=True):
        assert begin < end == following[0]
        assert begin % 64 == 0
    if len(ranges) > 1:
        assert num_tokens // len(ranges) >= min_tokens


def test_short_prompts_stay_on_one_rank() -> None:
    assert place_tokens(7, 64, 4, 128) == ((0, 7),)
    assert place_tokens(500, 64, 3, 128) == ((0, 128), (128, 320), (320, 500))


def test_holders_are_the_ranks_with_most_room() -> None:
    assert choose_holders([5, 9, 7], 2) == (1, 2)
    assert choose_holders([5, 5, 5], 1) == (0,)


@given(st.data())
def test_bytes_are_those_of_the_rows(data: st.DataObject) -> None:
    num_ranks = data.draw(st.integers(1, 6))
    ranks = st.integers(0, num_ranks - 1)
    rows = []
    for row_id in range(data.draw(st.integers(0, 10))):
        holders = tuple(sorted(data.draw(st.sets(ranks, min_size=1))))
        rows.append(DecodeRow(row_id, data.draw(st.sampled_from(holders)), holders))
    plan = DecodePlan(tuple(rows), num_ranks, 8, 32, 4)
    assert plan.bytes_per_layer() == sum(plan.row_bytes_per_layer(row) for row in rows)
    assert plan.exchanges == (plan.bytes_per_layer() > 0)


def test_one_row_costs_the_closed_form() -> None:
    row = DecodeRow(1, 0, (0, 1, 2))
    plan = DecodePlan((row,), 3, 32, 128, 2)
    assert plan.row_bytes_per_layer(row) == (3 - 1) * 32 * (2 * 2 * 128 + 4)


def test_a_home_holds() -> None:
    with pytest.raises(ValueError, match="home 2 must be one of its holders"):
        DecodeRow(1, 2, (0, 1))
