"""Relayout: every token once, for any number of sources and targets."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from sps2.internal.v1.placement_pb2 import Placement, ShardPlacement
from sps2_engine.kv_transfer.relayout import cut, shares, transfer_bytes


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Borders of 1 to 8 sources and of 1 to 8 targets over the same prompt."""
    num_tokens = draw(st.integers(1, 3000))
    inner = st.lists(st.integers(0, num_tokens), max_size=7)
    return [0, *sorted(draw(inner)), num_tokens], [0, *sorted(draw(inner)), num_tokens]


@given(layout=layouts(), token_bytes=st.integers(1, 300), max_slab_bytes=st.integers(300, 5000))
def test_every_token_goes_once_to_the_shard_that_takes_it(
    layout: tuple[list[int], list[int]], token_bytes: int, max_slab_bytes: int
) -> None:
    source_borders, target_borders = layout
    placement = Placement(
        shards=[
            ShardPlacement(rank=rank, token_begin=begin, token_end=end)
            for rank, (begin, end) in enumerate(pairwise(target_borders))
        ]
    )
    sent: list[tuple[int, int]] = []
    total_bytes = 0
    for begin, end in pairwise(source_borders):
        parts = shares(placement, begin, end)
        total_bytes += transfer_bytes(parts, 1, token_bytes)
        for slab in (slab for part in parts for slab in cut(part, token_bytes, max_slab_bytes)):
            shard = placement.shards[slab.shard]
            assert shard.token_begin <= slab.begin < slab.end <= shard.token_end
            assert slab.num_tokens * token_bytes <= max_slab_bytes
            sent.extend((token, slab.shard) for token in range(slab.begin, slab.end))
    assert [token for token, _ in sent] == list(range(source_borders[-1]))
    assert total_bytes == source_borders[-1] * token_bytes
