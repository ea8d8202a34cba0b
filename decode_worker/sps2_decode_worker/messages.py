"""What the leader of a decode group says of an attempt, to its ranks and to the directory. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sps2.internal.v1 import decode_service_pb2, engine_pb2, kv_directory_service_pb2, placement_pb2
from sps2_decode_worker.attempts import LiveAttempt
from sps2_decode_worker.tenants import Row, Tenant
from sps2_engine.kv_transfer.mesh_shards import mesh_shards
from sps2_engine.mesh import Mesh
from sps2_layout.placement import num_held

BLOCK_TOKENS = 64


@dataclass(frozen=True)
class FormedGroup:
    """A decode group in one epoch, and its engines by rank."""

    name: str
    epoch: int
    mesh: Mesh
    ranks: Sequence[engine_pb2.EngineLoaded]

    def ranks_at(self, holders: Iterable[int]) -> set[int]:
        """The ranks behind holders as the scheduler numbers them, by sequence index."""
        return {rank for holder in holders for rank in self.mesh.ranks_at(holder)}


def reserve_message(
    group: FormedGroup, request: decode_service_pb2.ReserveKv, rows: list[Row]
) -> engine_pb2.ReserveRow:
    """What the ranks are told of an attempt's rows, one for each choice."""
    row, *more = rows
    return engine_pb2.ReserveRow(
        row=row.row_id,
        attempt=request.attempt,
        placement=_placement(group, request.attempt, row.tenant),
        home=row.home,
        num_prompt_tokens=request.num_prompt_tokens,
        choice=request.choice,
        choice_rows=[one.row_id for one in more],
        held_from=row.tenant.held_from,
    )


def _placement(group: FormedGroup, attempt: placement_pb2.Attempt, tenant: Tenant) -> placement_pb2.Placement:
    placement = placement_pb2.Placement(group=group.name)
    for rank, num_blocks in tenant.places.held:
        begin = num_held(placement)
        placement.held.add(rank=rank, token_begin=begin, token_end=begin + num_blocks * BLOCK_TOKENS)
    for shard in mesh_shards(tenant.places.shards, group.mesh, group.ranks[0].num_kv_heads):
        loaded = group.ranks[shard.rank]
        shard.transfer_address = loaded.transfer_address
        shard.fence.process_incarnation = loaded.process_incarnation
        shard.fence.epoch = group.epoch
        shard.fence.attempt.CopyFrom(attempt)
        placement.shards.append(shard)
    return placement


def shard_record(group: FormedGroup, live: LiveAttempt) -> kv_directory_service_pb2.RequestRecord:
    """Where an attempt's KV lies now."""
    record = kv_directory_service_pb2.RequestRecord(
        attempt=live.request.attempt,
        prefill_group=live.request.prefill_group,
        decode_group=group.name,
        attention=live.request.attention,
        num_shared_tokens=num_held(live.reserve.placement),
    )
    for holder, begin, end, num_blocks in live.shards:
        for rank in group.mesh.ranks_at(holder):
            record.shards.add(
                worker_id=f"{group.name}/{rank}",
                epoch=group.epoch,
                layer_begin=0,
                layer_end=group.ranks[rank].num_layers,
                token_begin=begin,
                token_end=end,
                num_blocks=num_blocks,
            )
    return record
