"""An attempt as the ranks of one tensor index see it. Pure.

The leader's scheduler and what the ranks of one tensor index do among themselves know sequence indices only; the ranks
of a mesh are numbered where shards are delivered to them (`sps2_engine.kv_transfer.mesh_shards`).
"""

from sps2.internal.v1.engine_pb2 import ReserveRow
from sps2_engine.mesh import TensorShare


def own_lane(reserve: ReserveRow, share: TensorShare) -> ReserveRow:
    """An attempt as the ranks of one tensor index see it: their shards alone, by sequence index."""
    lane = ReserveRow()
    lane.CopyFrom(reserve)
    del lane.placement.shards[:]
    for shard in reserve.placement.shards:
        if shard.rank % share.tp == share.index:
            lane.placement.shards.add().CopyFrom(shard)
            lane.placement.shards[-1].rank = shard.rank // share.tp
    return lane
