"""Where an attempt's KV lies on a mesh: every head of every token once for each rank that holds it."""

import pytest

from sps2.internal.v1.engine_pb2 import ReserveRow
from sps2.internal.v1.placement_pb2 import Placement
from sps2_decode_worker.mesh_placement import own_lane
from sps2_engine.kv_transfer.mesh_shards import mesh_shards
from sps2_engine.kv_transfer.relayout import check_covers, lanes
from sps2_engine.mesh import Mesh, TensorShare
from sps2_layout.layout import Span

TOKENS = {0: (128, 200), 2: (0, 128)}
"""Home is 0: it has the end of the prompt."""


def placement(mesh: Mesh, num_kv_heads: int) -> Placement:
    return Placement(shards=mesh_shards(TOKENS, mesh, num_kv_heads))


@pytest.mark.parametrize(("tp", "num_kv_heads"), [(1, 4), (2, 4), (4, 4), (4, 2), (2, 1)])
def test_each_tensor_rank_gets_its_heads_of_all_tokens(tp: int, num_kv_heads: int) -> None:
    mesh = Mesh(3, tp)
    made = placement(mesh, num_kv_heads)
    check_covers(made, 200, num_kv_heads)
    assert [shard.rank for shard in made.shards] == [rank + i for i in range(tp) for rank in (2 * tp, 0)]
    held = [lane.heads for lane in lanes(made, num_kv_heads)]
    assert held == [TensorShare(index, tp).kv_heads(num_kv_heads).span for index in range(tp)]


def test_the_ranks_of_one_tensor_index_see_their_own_shards_by_sequence_index() -> None:
    reserve = ReserveRow(row=3, home=0, placement=placement(Mesh(3, 2), 4))
    for index in range(2):
        lane = own_lane(reserve, TensorShare(index, 2))
        seen = {shard.rank: (shard.token_begin, shard.token_end) for shard in lane.placement.shards}
        assert seen == TOKENS
        assert {Span(one.head_begin, one.head_end) for one in lane.placement.shards} == {
            Span(2 * index, 2 * index + 2)
        }
        assert (lane.row, lane.home) == (3, 0)
    assert own_lane(reserve, TensorShare()) == reserve
