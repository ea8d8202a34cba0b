"""A rank's loop under its leader: whatever comes and goes, its blocks are those that the leader counts."""

import asyncio
import math
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
import torch

from sps2.internal.v1 import decode_service_pb2, engine_pb2
from sps2_decode_worker.attempts import LiveAttempt
from sps2_decode_worker.coordinator import DecodeCoordinator
from sps2_decode_worker.loop import DecodeRole
from sps2_engine.kv_pool import BLOCK_TOKENS
from sps2_engine.rank_groups import RankGroups
from sps2_engine.runtime.options import EngineOptions
from sps2_service.errors import ServiceError, Unavailable
from sps2_service.ranks.group import GroupState
from support.checkpoints import make_tiny_checkpoint

NUM_BLOCKS = 9
STOP_IDS = range(200)
"""Many, so that rows end early and at any moment."""


class NoDirectory:
    """In place of a DirectoryClient."""

    def record_shards(self, *_: object) -> None:
        """Nobody asks."""

    def release(self, _: object) -> None:
        """Nothing was recorded."""


@dataclass
class NoTransfers:
    """In place of a KvReceiver: what comes is zeros, and is there at once."""

    def expect(self, _fence: object, _begin: int, _end: int, _blocks: object, on_complete: object) -> None:
        assert callable(on_complete)
        on_complete()

    def forget(self, _: object) -> None:
        """Nothing came."""


@dataclass
class OneRank:
    """A group of one rank whose role executes each plan on the event loop, some time after it was sent."""

    role: DecodeRole
    coordinator: DecodeCoordinator
    size: int = 1
    name: str = "decode-0"
    state: GroupState = GroupState.FORMED
    missing: str = ""
    epoch: int = 1
    num_checked: int = 0
    failure: AssertionError | None = None
    most_used: int = 0

    def check_lease(self) -> None:
        """It has one."""

    def broadcast(self, command: engine_pb2.EngineCommand) -> None:
        asyncio.get_running_loop().call_soon(self._execute, command)

    def send_event(self, event: engine_pb2.EngineEvent) -> None:
        asyncio.get_running_loop().call_soon(self.coordinator.on_event, 0, event)

    def _execute(self, command: engine_pb2.EngineCommand) -> None:
        self.num_checked += len(command.step_plan.blocks_used) == 1
        try:
            self.role.execute(command)
        except AssertionError as error:
            self.failure = self.failure or error
        self.most_used = max(self.most_used, self.role.kv_blocks_used)


class Link:
    """In place of the link to the supervisor."""

    group: OneRank

    def send(self, event: engine_pb2.EngineEvent) -> None:
        self.group.send_event(event)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny", "llama")


def start(checkpoint: Path) -> OneRank:
    """A rank with its weights, and its leader."""
    link = Link()
    options = EngineOptions(
        name="decode-0/0",
        rank=0,
        model=str(checkpoint),
        model_hash="hash",
        host="127.0.0.1",
        device="cpu",
        dtype="fp32",
        threads=1,
        kv_tokens=NUM_BLOCKS * BLOCK_TOKENS,
        kv_transport="grpc",
        collective_timeout_s=10.0,
        tp=1,
    )
    role = DecodeRole(options, torch.device("cpu"), torch.float32, link)  # type: ignore[arg-type]
    loaded = role.load(lambda _: None)
    role.join(RankGroups.solo(role.bytes_posted), 1)
    role.notice(engine_pb2.EngineCommand(hold_lease=engine_pb2.HoldLease(holds_until_s=math.inf)))
    role._loaded_receiver._receiver = NoTransfers()  # type: ignore[assignment]
    role._model.arena.k.zero_()
    role._model.arena.v.zero_()
    coordinator = DecodeCoordinator(NoDirectory(), "hash", 128, debug_invariants=True)  # type: ignore[arg-type]
    link.group = OneRank(role, coordinator)
    coordinator.attach(link.group)  # type: ignore[arg-type]
    coordinator.on_formed(1, [loaded])
    return link.group


def request(number: int, random: Random) -> decode_service_pb2.ReserveKv:
    made = decode_service_pb2.ReserveKv(
        num_prompt_tokens=random.randint(1, 70), model_hash="hash", asked_at_us=number
    )
    made.attempt.request_id = str(number)
    choice = made.choice
    choice.max_tokens, choice.num_choices = random.randint(80, 150), random.choice([1, 1, 1, 2, 3])
    choice.sampling.temperature, choice.sampling.top_p, choice.sampling.seed = 1.0, 1.0, number
    choice.sampling.repetition_penalty = 1.0
    choice.stop_token_ids.extend(random.sample(STOP_IDS, random.choice([0, 0, 2])))
    return made


async def serve(group: OneRank, asked: decode_service_pb2.ReserveKv, random: Random) -> str:
    """One attempt, which may be given up in the middle; how it ended."""
    live: LiveAttempt | None = None
    try:
        while live is None:
            try:
                live = await group.coordinator.reserve(asked)
            except Unavailable as error:
                if error.reason not in {"NO_KV_ROOM", "PREEMPTED"}:
                    raise
                await asyncio.sleep(0.01)
        more = [1] * (asked.choice.num_choices - 1)
        await group.coordinator.commit(
            live, decode_service_pb2.StartDecode(first_token_id=1, more_first_token_ids=more)
        )
        left = random.choice([5, 1_000, 1_000, 1_000])
        async for _ in group.coordinator.tokens(live):
            left -= 1
            if not left:
                return "given up"
    except ServiceError as error:
        return error.reason
    finally:
        if live is not None:
            group.coordinator.release(live)
    return "ended"


async def test_blocks_are_those_that_the_leader_counts(checkpoint: Path) -> None:
    group, random = start(checkpoint), Random(3)
    async with asyncio.timeout(100):
        ends = await asyncio.gather(*(serve(group, request(number, random), random) for number in range(9)))
    await asyncio.sleep(0.01)  # the last plan
    if group.failure is not None:
        raise group.failure
    assert "ended" in ends
    assert group.num_checked > 100
    assert group.most_used >= NUM_BLOCKS - 1, "there was room for all"
    assert group.role.kv_blocks_used == 0
