"""Which shards a placement on a mesh of ranks has: tokens by sequence index, heads by tensor index. Pure."""

from collections.abc import Iterator, Mapping

from sps2.internal.v1.placement_pb2 import ShardPlacement
from sps2_engine.mesh import Mesh, TensorShare


def mesh_shards(
    tokens: Mapping[int, tuple[int, int]], mesh: Mesh, num_kv_heads: int
) -> Iterator[ShardPlacement]:
    """The shards of a placement: those of all sequence indices by tokens, for one tensor index after the other.

    Args:
        tokens: [begin, end) by sequence index; together all of the prompt that the group does not hold already.
        mesh: of the group.
        num_kv_heads: of the model; where tensor ranks outnumber them, several hold the same.
    """
    by_tokens = sorted(tokens.items(), key=lambda item: item[1])
    for index in range(mesh.tp):
        heads = TensorShare(index, mesh.tp).kv_heads(num_kv_heads)
        for position, (begin, end) in by_tokens:
            shard = ShardPlacement(rank=mesh.ranks_at(position)[index], token_begin=begin, token_end=end)
            if not heads.is_all:
                shard.head_begin, shard.head_end = heads.span.begin, heads.span.end
            yield shard
