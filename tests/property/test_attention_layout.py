"""The mask as a message: nothing is lost on the way, and what is no mask is refused."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sps2.internal.v1 import placement_pb2
from sps2_layout.attention import Attention
from sps2_layout.profiles import EXACT, Ladder, Profile
from sps2_layout.wire import pack_attention, unpack_attention


@st.composite
def ladders(draw: st.DrawFn) -> Ladder:
    """Ladders of up to three rungs; the empty one is exact."""
    counts = sorted(draw(st.sets(st.sampled_from([1, 2, 4, 8, 16]), max_size=3)))
    return Ladder("drawn", tuple(draw(profiles(count)) for count in counts), draw(st.integers(1, 50)))


@st.composite
def profiles(draw: st.DrawFn, num_shards: int) -> Profile:
    levels, group, stride = [(1, 1)], 1, 1
    while group < num_shards and draw(st.booleans()):
        group *= 2
        stride *= draw(st.sampled_from([1, 2, 3]))
        levels.append((group, stride))
    sizes = st.integers(0, 100)
    return Profile(num_shards, tuple(levels), draw(st.booleans()), draw(sizes), draw(sizes))


@given(ladders(), st.integers(1, 2_000_000), st.integers(1, 33))
def test_round_trip_and_slices(ladder: Ladder, num_tokens: int, group_size: int) -> None:
    attention = Attention.admit(ladder, num_tokens)
    wire = pack_attention(attention).SerializeToString()
    assert unpack_attention(placement_pb2.AttentionLayout.FromString(wire)) == attention

    num_ranks, layout = attention.num_ranks(group_size), attention.sliced(group_size)
    assert 1 <= num_ranks <= group_size
    assert layout.num_shards % num_ranks == 0
    assert sum(len(layout.rank_tokens(rank, num_ranks)) for rank in range(group_size)) == num_tokens


CSA = Attention.admit(Ladder("x", (Profile(4, ((1, 1), (4, 2))),), 1), 100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": 0, "num_prefilled": 0}, "not a layout"),
        ({"num_prefilled": 101}, "cannot be prefilled"),
        ({"num_prefilled": 0}, "cannot be prefilled"),
        ({"csa": {"num_shards": 6}}, "divide all|powers of two"),
        ({"csa": {"num_shards": 0}}, "not a layout"),
        ({"csa": {"shard_tokens": 2}}, "do not cover"),
        ({"csa": {"query_mode": 7}}, "query mode 7"),
        ({"csa": {"query_mode": 0}}, "query mode 0"),
        ({"csa": {"tail": -1}}, "not a layout"),
    ],
)
def test_messages_that_are_no_mask(changes: dict[str, Any], message: str) -> None:
    packed = pack_attention(CSA)
    for name, value in changes.items():
        if isinstance(value, dict):
            for field, inner in value.items():
                setattr(packed.csa, field, inner)
        else:
            setattr(packed, name, value)
    with pytest.raises(ValueError, match=message):
        unpack_attention(packed)


def test_levels_that_are_none() -> None:
    for group, stride in ((0, 2), (4, 0), (-1, 1)):
        packed = pack_attention(CSA)
        packed.csa.levels[1].group, packed.csa.levels[1].stride = group, stride
        with pytest.raises(ValueError, match="at least 1"):
            unpack_attention(packed)
    without = pack_attention(Attention.admit(EXACT, 3))
    without.ClearField("exact")
    with pytest.raises(ValueError, match="no mask"):
        unpack_attention(without)
