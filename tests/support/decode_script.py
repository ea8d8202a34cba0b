"""Plans that a leader would send for two requests, and real models on a mesh of Gloo ranks that execute them."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch

from sps2.internal.v1 import engine_pb2
from sps2.internal.v1.prefill_service_pb2 import TokenChoice
from sps2.v1.generation_pb2 import SamplingSpec
from sps2_decode_worker.loop import DecodeRole
from sps2_decode_worker.move_messages import move_message
from sps2_decode_worker.placing import Asked
from sps2_decode_worker.scheduler import DecodeScheduler
from sps2_decode_worker.tenants import Row
from sps2_engine.kv_pool import BLOCK_TOKENS, slot_runs
from sps2_engine.kv_transfer.mesh_shards import mesh_shards
from sps2_engine.mesh import Mesh, TensorShare
from sps2_engine.models import read_model_config
from sps2_engine.models.tensor_bytes import tensor_bytes
from sps2_engine.rank_groups import RankGroups
from sps2_engine.runtime.link import SupervisorLink
from sps2_engine.runtime.options import EngineOptions
from support.decode_ranks import reserve_message
from support.ranks import run_mesh

NUM_STEPS = 80
NUM_BLOCKS = 64
PROMPTS = (400, 200)
CHOICES = (
    TokenChoice(sampling=SamplingSpec(top_p=1, repetition_penalty=1.3), max_tokens=200, prompt_token_ids=[7]),
    TokenChoice(
        sampling=SamplingSpec(temperature=1, top_p=1, seed=5, frequency_penalty=0.4),
        max_tokens=200,
        num_choices=2,
    ),
)
"""What a new home must know to go on: penalties count tokens, random numbers their places."""


Resizes: TypeAlias = Mapping[int, Sequence[tuple[int, int, tuple[int, ...]]]]
"""By step: (request, degree, ranks)."""


class EventLog(SupervisorLink):
    """In place of the supervisor."""

    def __init__(self) -> None:
        self.events: list[engine_pb2.EngineEvent] = []

    def send(self, event: engine_pb2.EngineEvent) -> None:
        """Keeps it."""
        self.events.append(event)


@dataclass
class Script:
    """Plans that a leader would send, and what must come of them."""

    plans: list[engine_pb2.StepPlan] = field(default_factory=list)
    bytes_by_row: dict[int, int] = field(default_factory=dict)
    """Of Q exchange in one layer, by the closed form for the holders of each step, in units of (h - 1)."""
    num_blocks_moved: int = 0
    home_bytes: int = 0
    """Numbers that changes of home take along."""
    homes: set[int] = field(default_factory=set)


def write_script(num_ranks: int, resizes: Resizes) -> Script:
    """Two requests, of which the second has two choices."""
    scheduler = DecodeScheduler((NUM_BLOCKS,) * num_ranks, BLOCK_TOKENS, 10_000, blocks_per_plan=2)
    asked = [
        scheduler.reserve(Asked(num_tokens, choice.max_tokens, max(1, choice.num_choices)))
        for num_tokens, choice in zip(PROMPTS, CHOICES, strict=True)
    ]
    script = Script()
    messages = {
        rows[0].row_id: reserve_message(rows, choice) for rows, choice in zip(asked, CHOICES, strict=True)
    }
    rows = [row for one in asked for row in one]
    for step in range(-1, NUM_STEPS):
        for which, degree, ranks in resizes.get(step, []):
            assert scheduler.resize(asked[which][0].row_id, degree, ranks)
        _note_step(script, rows, step)
        plan = scheduler.next_plan()
        assert plan is not None
        scheduler.steps_in_flight = 0
        script.plans.append(
            engine_pb2.StepPlan(
                sequence=plan.sequence,
                reserve=[messages[row_id] for row_id in plan.reserve if row_id in messages],
                admit=[engine_pb2.AdmitRow(row=row_id, first_token_id=5) for row_id in plan.admit],
                run=plan.run,
                moves=[move_message(one) for one in plan.moves],
                blocks_used=plan.blocks_used,
            )
        )
        for one in plan.moves:
            script.num_blocks_moved += one.num_blocks
            script.home_bytes += 0 if one.moves else len(one.rows) * 8 * (4 + one.num_outputs)
            script.num_blocks_moved += 0 if one.moves else len(one.rows)
        if step < 0:
            for row in rows:
                scheduler.admit(row.row_id)
    script.homes = {row.home for row in rows}
    return script


def _note_step(script: Script, rows: Sequence[Row], step: int) -> None:
    for row in rows if step >= 0 else ():
        away = len(row.tenant.spread.holders) - 1
        script.bytes_by_row[row.row_id] = script.bytes_by_row.get(row.row_id, 0) + away


@dataclass
class Executed:
    """What came of a script."""

    mesh: Mesh
    tokens: dict[int, list[engine_pb2.RowToken]]
    """Of each row, as told to the leader."""
    posted: Counter[str]
    """Bytes by kind, of all ranks."""


def execute(folder: Path, mesh: Mesh, script: Script) -> Executed:
    """Has the ranks of a mesh execute it; tensor ranks must draw the same tokens, and one of them tell it."""
    results = run_mesh(mesh, lambda groups: _execute_on(groups, folder, mesh, script))
    tokens: dict[int, list[engine_pb2.RowToken]] = {}
    posted: Counter[str] = Counter()
    for rank, (log, drawn, counted) in enumerate(results):
        posted += counted
        assert drawn == results[mesh.tensor_ranks(rank)[0]][1]
        steps = [event.step_result for event in log.events if event.HasField("step_result")]
        for token in (token for step in steps for token in step.tokens):
            tokens.setdefault(token.row, []).append(token)
    for made in tokens.values():
        made.sort(key=lambda token: token.index)  # a row that has had several homes
    return Executed(mesh, tokens, posted)


def _execute_on(
    groups: RankGroups, folder: Path, mesh: Mesh, script: Script
) -> tuple[EventLog, dict[int, list[int]], Counter[str]]:
    """What one rank told, the tokens of its rows in the end, and the bytes that it posted."""
    rank, log = groups.everyone.rank, EventLog()
    options = EngineOptions(
        name=f"decode-0/{rank}",
        rank=rank,
        model=str(folder),
        model_hash="one",
        host="127.0.0.1",
        device="cpu",
        dtype="fp32",
        threads=1,
        kv_tokens=NUM_BLOCKS * BLOCK_TOKENS,
        kv_transport="grpc",
        collective_timeout_s=30.0,
        tp=mesh.tp,
    )
    role = DecodeRole(options, torch.device("cpu"), torch.float32, log)
    role.load(lambda _: None)
    role.join(groups, 1)
    for plan in script.plans:
        role.execute(engine_pb2.EngineCommand(step_plan=_on_mesh(role, mesh, plan)))
        _deliver(role, plan)
    drawn = {row_id: list(row.token_ids) for row_id, row in role._rows.items()}
    role.reset()
    assert role.kv_blocks_used == 0
    return log, drawn, groups.everyone.bytes_posted


def _on_mesh(role: DecodeRole, mesh: Mesh, plan: engine_pb2.StepPlan) -> engine_pb2.StepPlan:
    """With its shards by rank, and with the fences of this rank, which only it knows here."""
    own = engine_pb2.StepPlan()
    own.CopyFrom(plan)
    for reserve in own.reserve:
        tokens = {shard.rank: (shard.token_begin, shard.token_end) for shard in reserve.placement.shards}
        del reserve.placement.shards[:]
        for shard in mesh_shards(tokens, mesh, role._model.decoder.config.num_kv_heads):
            shard.fence.process_incarnation = role._model.incarnation
            shard.fence.attempt.request_id = f"request {reserve.row}"
            reserve.placement.shards.append(shard)
    return own


def _deliver(role: DecodeRole, plan: engine_pb2.StepPlan) -> None:
    """In place of prefill: the same KV for the same token and head wherever it lies."""
    for reserve in plan.reserve:
        row, arena = role._rows[reserve.row], role._model.arena
        if row.num_local:
            generator = torch.Generator().manual_seed(reserve.num_prompt_tokens)
            num_heads = role._model.decoder.config.num_kv_heads
            shape = (2, arena.num_layers, reserve.num_prompt_tokens, num_heads, arena.head_dim)
            kv = torch.randn(shape, generator=generator)[:, :, :, arena.heads.slice]
            slots = [slot for run in slot_runs(row.blocks, row.num_local) for slot in range(*run)]
            arena.k[:, slots], arena.v[:, slots] = kv[0], kv[1]


def check_bytes(folder: Path, script: Script, executed: Executed) -> None:
    """What was posted and told is the closed form, kind by kind."""
    config, mesh, posted = read_model_config(folder), executed.mesh, executed.posted
    by_row = {
        # (h - 1) * Hq * (2bd + 4) in each layer of each step, with the holders that it had in that step.
        row_id: away * config.num_q_heads * (2 * 4 * config.head_dim + 4) * config.num_layers
        for row_id, away in script.bytes_by_row.items()
    }
    assert {row_id: made[-1].q_exchange_bytes for row_id, made in executed.tokens.items()} == by_row
    assert posted["q_exchange"] == sum(by_row.values())
    shares = [TensorShare(index, mesh.tp) for index in range(mesh.tp)]
    one_row = sum(tensor_bytes(config, share, 1, 1) for share in shares)
    compared = 2 * 8 * (mesh.tp - 1)  # a row's last token in fp64, since these plans ask for checks
    assert posted["tensor"] == NUM_STEPS * len(by_row) * (one_row + compared)
    held_heads = sum(len(share.kv_heads(config.num_kv_heads)) for share in shares)
    block_bytes = 2 * config.num_layers * BLOCK_TOKENS * held_heads * config.head_dim * 4
    assert posted["kv_move"] == script.num_blocks_moved * block_bytes + mesh.tp * script.home_bytes


def ids(executed: Executed) -> Iterator[tuple[int, list[int]]]:
    """Token ids of each row, whose indices have no gap."""
    for row_id, made in sorted(executed.tokens.items()):
        assert [token.index for token in made] == list(range(1, NUM_STEPS + 1))
        yield row_id, [token.token_id for token in made]
