"""Prefill engines of one group as threads: real weights, collectives and KV blocks; KV goes nowhere unless asked.

What the leader would send is told by the test, also from inside what a rank reports.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch

from sps2.internal.v1 import engine_pb2
from sps2_engine.attention.cost_model import Choice, make_plan
from sps2_engine.collectives import GroupError
from sps2_engine.kv_transfer.sender import KvSender
from sps2_engine.kv_transfer.transfer import Transfer
from sps2_engine.mesh import Mesh, TensorShare
from sps2_engine.rank_groups import RankGroups
from sps2_engine.runtime.link import SupervisorLink
from sps2_engine.runtime.options import EngineOptions
from sps2_layout.attention import Attention
from sps2_layout.layout import exact_layout
from sps2_layout.wire import pack_attention
from sps2_prefill_worker.loop import PrefillRole
from sps2_prefill_worker.planning import PromptPlanner
from sps2_prefill_worker.publish import Publisher
from support.ranks import run_mesh

KV_TOKENS = 4096
TIMEOUT_S = 20.0
EPOCH = 1

Hook = Callable[["PrefillRanks", int, engine_pb2.EngineEvent], None]
"""Called with each event of each rank, on the thread that computes there."""


class NoSender:
    """In place of a `KvSender`: transfers that last until they are given up."""

    def begin(self, attempt: object, placement: object, _spans: object, rows: object) -> Transfer:
        """A transfer that nobody takes."""
        return Transfer(attempt, placement, rows)  # type: ignore[arg-type]

    def layer_ready(self, transfer: Transfer, layer: int) -> None:
        """Nobody waits for it."""

    def abort(self, _transfer: Transfer) -> "Future[None]":
        """Over at once."""
        quiet: Future[None] = Future()
        quiet.set_result(None)
        return quiet


@dataclass
class RankLink:
    """In place of a `SupervisorLink`: keeps what a rank reports."""

    told: Callable[[engine_pb2.EngineEvent], None]

    def send(self, event: engine_pb2.EngineEvent) -> None:
        """One event."""
        self.told(event)


@dataclass
class PrefillRanks:
    """The engines of a group.

    Args:
        model: a checkpoint.
        mesh: the group.
        sends: whether KV leaves.
    """

    model: Path
    mesh: Mesh
    hook: Hook = lambda _ranks, _rank, _event: None
    sends: bool = False
    roles: list[PrefillRole] = field(default_factory=list)
    events: list[list[engine_pb2.EngineEvent]] = field(default_factory=list)
    """By rank."""
    errors: list[GroupError | None] = field(default_factory=list)
    """What ended a rank's commands."""

    def begin(self, hook: Hook) -> None:
        """Forgets what was reported."""
        self.hook = hook
        self.events = [[] for _ in range(self.mesh.size)]
        self.errors = [None] * self.mesh.size

    def __post_init__(self) -> None:
        self.begin(self.hook)
        for rank in range(self.mesh.size):
            options = EngineOptions(
                name=f"prefill-0/{rank}",
                rank=rank,
                model=str(self.model),
                model_hash="",
                host="127.0.0.1",
                device="cpu",
                dtype="fp32",
                threads=1,
                kv_tokens=KV_TOKENS,
                kv_transport="grpc",
                collective_timeout_s=TIMEOUT_S,
                tp=self.mesh.tp,
            )
            link = cast("SupervisorLink", RankLink(lambda event, rank=rank: self._on_event(rank, event)))  # type: ignore[misc]
            role = PrefillRole(options, torch.device("cpu"), torch.float32, link)
            self.loaded = role.load(lambda _fraction: None)
            self.roles.append(role)
            if self.sends:
                hold = engine_pb2.HoldLease(holds_until_s=math.inf)
                self.notice(rank, engine_pb2.EngineCommand(hold_lease=hold))
                continue
            sender = cast("KvSender", NoSender())
            role._publisher = Publisher(role._model.pool, sender, role.bytes_posted, options.name, role._send)

    def run_of(
        self,
        number: int,
        token_ids: Sequence[int],
        slice_flops: int,
        *,
        short: bool,
        alone_on: int | None = None,
    ) -> list[engine_pb2.RunPrefill]:
        """What the leader tells each rank of a prompt, request "number"."""
        attention = Attention(len(token_ids), len(token_ids))
        planner = self.planner("heads")
        planned = planner.plan(attention, len(token_ids))
        if alone_on is not None:
            shape = planner.model.of_share(TensorShare(0, self.mesh.tp))
            alone = make_plan("heads", exact_layout(len(token_ids), 1), 1, shape)
            planned = replace(planned, plan=alone, alone=True)
        runs = []
        for rank in range(self.mesh.size):
            run = engine_pb2.RunPrefill(
                num_prompt_tokens=len(token_ids),
                attention=pack_attention(attention),
                slice_flops=slice_flops,
                number=number,
            )
            run.attempt.request_id, run.attempt.number = str(number), 1
            run.choice.sampling.top_p = 1.0
            planned.assign(rank, run, token_ids, alone_on)
            run.interlude_flops = int(short)
            runs.append(run)
        return runs

    def planner(self, choice: Choice) -> PromptPlanner:
        """The leader's; all ranks share every prompt."""
        return PromptPlanner.of([self.loaded] * self.mesh.size, choice, 1, self.mesh.tp, "all")

    def notice(self, rank: int, command: engine_pb2.EngineCommand) -> None:
        """A command has come to a rank; its turn comes with `execute`."""
        self.roles[rank].notice(command)

    def execute(
        self,
        commands: Sequence[Sequence[engine_pb2.EngineCommand]],
        hook: Hook = lambda _ranks, _rank, _event: None,
        told: int = 1,
    ) -> None:
        """Runs commands in order on all ranks, as one epoch of the group.

        Args:
            commands: each by rank.
            hook: see `Hook`.
            told: so many have come before the first is executed; the hook tells of the others.
        """
        self.begin(hook)

        def on_rank(groups: RankGroups) -> None:
            rank, role = groups.everyone.rank, self.roles[groups.everyone.rank]
            role.join(groups, EPOCH)
            for command in commands[:told]:
                self.notice(rank, command[rank])
            try:
                for command in commands:
                    role.execute(command[rank])
            except GroupError as error:
                self.errors[rank] = error
                groups.close()
                role.reset()

        run_mesh(self.mesh, on_rank)

    def reports(self, rank: int) -> list[tuple[str, str]]:
        """(request, kind of report) of a rank, in order, but for progress."""
        reports = (event.prefill for event in self.events[rank] if event.HasField("prefill"))
        kinds = ((report.attempt.request_id, str(report.WhichOneof("report"))) for report in reports)
        return [one for one in kinds if one[1] != "progress"]

    def first_token(self, request: str) -> int:
        """The first token of a request, which one rank has drawn."""
        (token,) = (
            event.prefill.first_token.token_id
            for events in self.events
            for event in events
            if event.prefill.HasField("first_token") and event.prefill.attempt.request_id == request
        )
        return int(token)

    @property
    def blocks_used(self) -> list[int]:
        """By rank."""
        return [role.kv_blocks_used for role in self.roles]

    def _on_event(self, rank: int, event: engine_pb2.EngineEvent) -> None:
        self.events[rank].append(event)
        self.hook(self, rank, event)


def prefill(runs: Sequence[engine_pb2.RunPrefill]) -> list[engine_pb2.EngineCommand]:
    """The commands, by rank."""
    return [engine_pb2.EngineCommand(run_prefill=run) for run in runs]


def cancel(request: str, num_ranks: int) -> list[engine_pb2.EngineCommand]:
    """The commands that give up a request's first attempt, by rank."""
    command = engine_pb2.EngineCommand()
    command.cancel_prefill.attempt.request_id, command.cancel_prefill.attempt.number = request, 1
    return [command] * num_ranks
