"""What the leader of a decode group says of an attempt, to its ranks and to the directory. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sps2.internal.v1 import decode_service_pb2, engine_pb2, kv_directory_service_pb2, placement_pb2
from sps2_decode_worker.attempts import LiveAttempt
from sps2_decode_worker.move_messages import move_message
from sps2_decode_worker.scheduler import Plan
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


def plan_message(
    plan: Plan, rows: Mapping[int, LiveAttempt], *, with_blocks_used: bool
) -> engine_pb2.StepPlan:
    """What the ranks are told of a step.

    Args:
        plan: as the scheduler made it.
        rows: the attempt of each row that has not ended.
        with_blocks_used: tell ranks how many blocks they must have in use after it.
    """
    # A row may be released before the plan that was to reserve it went out; both then go in one plan, in
    # which the release comes first and names a row that no rank knows yet: neither is sent.
    # A message reserves the rows of all choices and stands under the first one's.
    reserve = [live for row_id in plan.reserve if (live := rows.get(row_id)) and live.row.row_id == row_id]
    return engine_pb2.StepPlan(
        sequence=plan.sequence,
        reserve=[live.reserve for live in reserve],
        admit=[
            engine_pb2.AdmitRow(row=row_id, first_token_id=rows[row_id].first_token_ids[row_id])
            for row_id in plan.admit
            if row_id in rows
        ],
        release_rows=[row_id for row_id in plan.release if row_id not in plan.reserve],
        run=plan.run,
        moves=[move_message(one) for one in plan.moves],
        blocks_used=plan.blocks_used if with_blocks_used else (),
    )


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
