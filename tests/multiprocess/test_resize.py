"""Live resize on four Gloo ranks: real models, plans and collectives; tokens as on one rank that is never resized."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
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
from sps2_engine.mesh import Mesh
from sps2_engine.rank_groups import RankGroups
from sps2_engine.runtime.link import SupervisorLink
from sps2_engine.runtime.options import EngineOptions
from support.checkpoints import make_tiny_checkpoint
from support.decode_ranks import reserve_message
from support.ranks import run_mesh

pytestmark = pytest.mark.multiprocess

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


def write_script(num_ranks: int, resizes: dict[int, list[tuple[int, int, tuple[int, ...]]]]) -> Script:
    """Two requests, of which the second has two choices; `resizes` by step: (request, degree, ranks)."""
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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("resize") / "model", "llama")


def execute(folder: Path, num_ranks: int, script: Script) -> tuple[dict[int, list[engine_pb2.RowToken]], int]:
    """Has the ranks execute it: the tokens of each row, and the bytes that moved between ranks besides Q and O."""

    def on_rank(groups: RankGroups) -> tuple[list[engine_pb2.EngineEvent], int, int]:
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
            tp=1,
        )
        role = DecodeRole(options, torch.device("cpu"), torch.float32, log)
        role.load(lambda _: None)
        role.join(groups, 1)
        for plan in script.plans:
            role.execute(engine_pb2.EngineCommand(step_plan=_fenced(role, plan)))
            _deliver(role, plan)
        role.reset()
        return log.events, groups.everyone.bytes_posted["kv_move"], role.kv_blocks_used

    results = run_mesh(Mesh(num_ranks, 1), on_rank)
    tokens: dict[int, list[engine_pb2.RowToken]] = {}
    for event in sorted(
        (one for events, _, _ in results for one in events), key=lambda e: e.step_result.sequence
    ):
        for token in event.step_result.tokens:
            tokens.setdefault(token.row, []).append(token)
    assert [used for _, _, used in results] == [0] * num_ranks
    return tokens, sum(moved for _, moved, _ in results)


def _fenced(role: DecodeRole, plan: engine_pb2.StepPlan) -> engine_pb2.StepPlan:
    """With the fences of this rank, which only it knows here."""
    own = engine_pb2.StepPlan()
    own.CopyFrom(plan)
    for reserve in own.reserve:
        for shard in reserve.placement.shards:
            shard.fence.process_incarnation = role._model.incarnation
            shard.fence.attempt.request_id = f"request {reserve.row}"
    return own


def _deliver(role: DecodeRole, plan: engine_pb2.StepPlan) -> None:
    """In place of prefill: the same KV for the same token wherever it lies."""
    for reserve in plan.reserve:
        row, arena = role._rows[reserve.row], role._model.arena
        if row.num_local:
            generator = torch.Generator().manual_seed(reserve.num_prompt_tokens)
            shape = (2, arena.num_layers, reserve.num_prompt_tokens, arena.num_kv_heads, arena.head_dim)
            kv = torch.randn(shape, generator=generator)
            slots = [slot for run in slot_runs(row.blocks, row.num_local) for slot in range(*run)]
            arena.k[:, slots], arena.v[:, slots] = kv[0], kv[1]


def ids(tokens: dict[int, list[engine_pb2.RowToken]]) -> Iterator[tuple[int, list[int]]]:
    """Token ids of each row, whose indices have no gap."""
    for row_id, made in sorted(tokens.items()):
        assert [token.index for token in made] == list(range(1, NUM_STEPS + 1))
        yield row_id, [token.token_id for token in made]


def test_one_to_four_to_two_and_another_home(checkpoint: Path) -> None:
    """1 -> 4 -> 2; then away from home; and two choices that go to two ranks of which neither was their home."""
    script = write_script(
        4,
        {
            5: [(0, 4, ())],
            20: [(0, 2, ())],
            40: [(0, 2, (2, 3)), (1, 2, (2, 3))],
            60: [(0, 1, (1,)), (1, 4, ())],
        },
    )
    alone, nothing_moved = execute(checkpoint, 1, write_script(1, {}))
    resized, moved = execute(checkpoint, 4, script)

    assert dict(ids(resized)) == dict(ids(alone))
    assert len({tuple(row) for _, row in ids(resized)}) == 3
    assert nothing_moved == 0
    layers, q_heads, kv_heads, dim = 2, 4, 2, 16
    block_bytes = 2 * layers * BLOCK_TOKENS * kv_heads * dim * 4
    assert moved == script.num_blocks_moved * block_bytes + script.home_bytes
    for row_id, made in resized.items():
        # (h - 1) * Hq * (2bd + 4) in each layer of each step, with the holders that it had in that step.
        expected = script.bytes_by_row[row_id] * q_heads * (2 * 4 * dim + 4) * layers
        assert made[-1].q_exchange_bytes == expected
    assert 1 in script.homes
