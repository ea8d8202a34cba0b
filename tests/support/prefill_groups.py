"""Prefill groups whole, in one process: the leader's coordinator over engines as threads, with KV that really moves.

A group stands in for its `GroupLeader`; what its leader asks of another goes to that one's coordinator directly.
"""

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sps2.internal.v1 import engine_pb2, prefill_service_pb2
from sps2_engine.mesh import Mesh
from sps2_engine.rank_groups import RankGroups
from sps2_layout.attention import Attention
from sps2_layout.block_hash import block_hashes
from sps2_layout.wire import pack_attention
from sps2_prefill_worker.coordinator import PrefillCoordinator
from sps2_prefill_worker.fetch_costs import FetchChoice, FetchCosts
from sps2_prefill_worker.planning import PromptPlanner
from sps2_prefill_worker.prefix_index import NO_INDEX
from sps2_service.errors import Unavailable
from sps2_service.ranks.group import GroupState
from support.prefill_ranks import EPOCH, PrefillRanks
from support.ranks import run_mesh

READY_S = 30.0


class Neighbours:
    """In place of `GrpcHolders`: groups of this process, by name."""

    def __init__(self) -> None:
        self.groups: dict[str, PrefillGroup] = {}
        self.asked: list[str] = []
        self.before: Callable[[], object] = lambda: None
        """Called before a group is asked."""

    async def send_prefix(
        self, address: str, request: prefill_service_pb2.SendPrefixRequest, timeout_s: float
    ) -> int:
        self.asked.append(address)
        self.before()
        async with asyncio.timeout(timeout_s):
            return await self.groups[address].coordinator.send_prefix(request)


class PrefillGroup:
    """A formed group. Made inside a running event loop; end it with `close`."""

    def __init__(
        self, name: str, model: Path, mesh: Mesh, neighbours: Neighbours, fetch: FetchChoice = "always"
    ) -> None:
        self.name, self.size, self.epoch, self.missing = name, mesh.size, EPOCH, ""
        self.state = GroupState.FORMED
        self.free = threading.Event()
        """While it is not set, ranks are busy with something else."""
        self.free.set()
        self.muted = False
        """Whether what ranks report is lost."""
        self.ranks = PrefillRanks(model, mesh, sends=True)
        loop = asyncio.get_running_loop()
        costs = FetchCosts(fetch)
        self.coordinator = PrefillCoordinator("heads", 1, mesh.tp, "all", NO_INDEX, costs, neighbours)
        self.coordinator.attach(self)  # type: ignore[arg-type]
        neighbours.groups[name] = self

        def on_event(_ranks: PrefillRanks, rank: int, event: engine_pb2.EngineEvent) -> None:
            loop.call_soon_threadsafe(self._on_event, rank, event)

        self.ranks.begin(on_event)
        self._commands: list[queue.SimpleQueue[engine_pb2.EngineCommand | None]] = [
            queue.SimpleQueue() for _ in range(mesh.size)
        ]
        self._joined = threading.Barrier(mesh.size + 1)
        self._thread = threading.Thread(target=run_mesh, args=(mesh, self._run_rank), name=name)
        self._thread.start()
        self._joined.wait(READY_S)
        self.coordinator.on_formed(EPOCH, [self.ranks.loaded] * mesh.size)

    def check_lease(self) -> None:
        """It always holds."""

    def send(self, rank: int, command: engine_pb2.EngineCommand) -> None:
        """As a supervisor's link does: noticed at once, executed in turn."""
        copied = engine_pb2.EngineCommand()
        copied.CopyFrom(command)
        copied.epoch = self.epoch
        self.ranks.notice(rank, copied)
        self._commands[rank].put(copied)

    def broadcast(self, command: engine_pb2.EngineCommand) -> None:
        """To every rank."""
        for rank in range(self.size):
            self.send(rank, command)

    def die(self) -> None:
        """Its epoch is over for the leader, and no rank is heard of any more."""
        self.muted, self.state = True, GroupState.WAITING
        self.coordinator.on_broken(Unavailable("RANK_DIED", f"rank 1 of {self.name} has died"))

    def close(self) -> None:
        """Ends the ranks; nothing may be under way."""
        for commands in self._commands:
            commands.put(None)
        self._thread.join(READY_S)
        for role in self.ranks.roles:
            role._loaded_publisher._sender.close()
            if role._arrivals is not None:
                role._arrivals.close()

    @property
    def planner(self) -> PromptPlanner:
        """The leader's."""
        assert self.coordinator._planner is not None
        return self.coordinator._planner

    @property
    def num_used(self) -> int:
        """Blocks that attempts hold, of all ranks."""
        return sum(self.ranks.blocks_used)

    def cached_kv(self, num_tokens: int) -> Tensor:
        """KV of the first tokens of the only text that is cached: [tokens, 2, layers, kv_heads, head_dim]."""
        parts: dict[int, dict[int, Tensor]] = {}
        for rank, role in enumerate(self.ranks.roles):
            arena = role._model.arena
            for rows in role._loaded_publisher._kept._runs.values():
                for span in rows.spans:
                    slots = [slot for run in rows.slots(span) for slot in range(*run)]
                    both = torch.stack([arena.k[:, slots], arena.v[:, slots]]).permute(2, 0, 1, 3, 4)
                    for token, kv in zip(range(span.begin, span.end), both, strict=True):
                        parts.setdefault(token, {})[rank % self.ranks.mesh.tp] = kv
        return torch.stack(
            [
                torch.cat([parts[token][t] for t in sorted(parts[token])], dim=-2)
                for token in range(num_tokens)
            ]
        )

    async def prefill(
        self, request: prefill_service_pb2.PrefillRequest
    ) -> tuple[prefill_service_pb2.FirstToken, prefill_service_pb2.PrefillDelivered]:
        """What a prompt's call says in the end."""
        first = delivered = None
        async for event in self.coordinator.prefill(request):
            first = event.first_token if event.HasField("first_token") else first
            delivered = event.delivered if event.HasField("delivered") else delivered
        assert first is not None
        assert delivered is not None
        return first, delivered

    def _run_rank(self, groups: RankGroups) -> None:
        rank = groups.everyone.rank
        role = self.ranks.roles[rank]
        role.join(groups, EPOCH)
        self._joined.wait(READY_S)
        while (command := self._commands[rank].get()) is not None:
            self.free.wait(READY_S)
            role.execute(command)
        role.reset()

    def _on_event(self, rank: int, event: engine_pb2.EngineEvent) -> None:
        if not self.muted:
            self.coordinator.on_event(rank, event)


def prompt(
    name: str,
    ids: Sequence[int],
    attention: Attention,
    sources: Sequence[tuple[str, int]] = (),
    *,
    reuse: bool = True,
) -> prefill_service_pb2.PrefillRequest:
    """A prompt whose KV its decode group holds already, so that it is delivered when it is computed.

    Args:
        name: its request id.
        ids: its tokens.
        attention: its mask.
        sources: groups that are said to hold its beginning, and how much.
        reuse: whether it finds and leaves anything.
    """
    hashes = block_hashes(ids, "model", b"") if reuse else ()
    made = prefill_service_pb2.PrefillRequest(
        token_ids=ids, attention=pack_attention(attention), block_hashes=hashes
    )
    made.attempt.request_id, made.attempt.number = name, 1
    made.choice.sampling.top_p = 1.0
    made.choice.max_tokens = 1
    made.placement.held.add(rank=0, token_begin=0, token_end=len(ids))
    for group, num_tokens in sources:
        made.prefix_sources.add(group=group, leader_address=group, num_tokens=num_tokens)
    return made
