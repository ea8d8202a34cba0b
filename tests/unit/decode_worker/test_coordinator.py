"""The leader of a decode group over ranks that do all at once: what it tells them, what it refuses, what it costs."""

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

from sps2.internal.v1 import decode_service_pb2, engine_pb2
from sps2.v1 import cluster_pb2
from sps2.v1.generation_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_UNSPECIFIED
from sps2_decode_worker import admitting
from sps2_decode_worker.attempts import LiveAttempt
from sps2_decode_worker.coordinator import DecodeCoordinator
from sps2_decode_worker.scheduler import MAX_PASSED
from sps2_service.errors import (
    Aborted,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ServiceError,
    Unavailable,
)
from sps2_service.ranks.group import GroupState
from sps2_service.trace_context import current_place
from sps2_service.tracing import Tracing

NUM_RANKS = 2
STEP_S = 0.02
"""Less than a step over 64 rows of the demo model takes on a CPU."""


class NoDirectory:
    """In place of a DirectoryClient."""

    def record_shards(self, *_: object) -> None:
        """Nobody asks."""

    def release(self, _: object) -> None:
        """Nothing was recorded."""


@dataclass
class InstantRanks:
    """A formed group whose ranks take up, receive and compute whatever a plan says before the next one."""

    coordinator: DecodeCoordinator
    size: int = NUM_RANKS
    tp: int = 1
    name: str = "decode-0"
    state: GroupState = GroupState.FORMED
    missing: str = ""
    epoch: int = 1
    fenced: bool = False
    fenced_follower: int | None = None
    plans: list[engine_pb2.StepPlan] = field(default_factory=list)
    homes: dict[int, int] = field(default_factory=dict)
    max_tokens: dict[int, int] = field(default_factory=dict)
    num_tokens: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    """Of each row that decodes."""

    def check_lease(self) -> None:
        """As the leader of a group does."""
        if self.fenced:
            raise Unavailable("FENCED", "the leader's lease does not hold")

    def broadcast(self, command: engine_pb2.EngineCommand) -> None:
        """As to every rank: what it answers comes back over the wire, later."""
        sent = command.SerializeToString()
        asyncio.get_running_loop().call_soon(self._execute, engine_pb2.EngineCommand.FromString(sent))

    def _execute(self, command: engine_pb2.EngineCommand) -> None:
        plan = command.step_plan
        self.plans.append(plan)
        for row in plan.release_rows:
            self.num_tokens.pop(row, None)
        self.homes |= {reserve.row: reserve.home for reserve in plan.reserve}
        self.max_tokens |= {reserve.row: reserve.choice.max_tokens for reserve in plan.reserve}
        self.num_tokens |= {admit.row: 1 for admit in plan.admit}
        for rank in range(self.size):
            for reserve in plan.reserve:
                if rank == self.fenced_follower:
                    refused = engine_pb2.AttemptFailed(row=reserve.row, reason="FENCED")
                    self._say(rank, attempt_failed=refused)
                    continue
                self._say(rank, rows_reserved=engine_pb2.RowsReserved(rows=[reserve.row]))
                self._say(rank, row_received=engine_pb2.RowReceived(row=reserve.row))
        for rank in range(self.size) if plan.run else ():
            made = [row for row in self.num_tokens if self.homes[row] * self.tp == rank]
            tokens = [self._token(row) for row in made]
            self._say(
                rank,
                step_result=engine_pb2.StepResult(sequence=plan.sequence, tokens=tokens, step_s=STEP_S),
            )

    def _token(self, row: int) -> engine_pb2.RowToken:
        index = self.num_tokens[row]
        self.num_tokens[row] += 1
        reason = FINISH_REASON_LENGTH if index + 1 == self.max_tokens[row] else FINISH_REASON_UNSPECIFIED
        return engine_pb2.RowToken(row=row, index=index, token_id=7, finish_reason=reason)

    def _say(self, rank: int, **event: object) -> None:
        sent = engine_pb2.EngineEvent(**event).SerializeToString()  # type: ignore[arg-type]
        self.coordinator.on_event(rank, engine_pb2.EngineEvent.FromString(sent))


def make(
    *kv_blocks: int, tp: int = 1, num_kv_heads: int = 1, debug: bool = False, tracing: Tracing | None = None
) -> tuple[DecodeCoordinator, InstantRanks]:
    """A leader of ranks with so many blocks each, or of two of one number."""
    coordinator = DecodeCoordinator(
        NoDirectory(),  # type: ignore[arg-type]
        "hash",
        128,
        tp=tp,
        debug_invariants=debug,
        tracing=tracing,
    )
    each = kv_blocks if len(kv_blocks) > 1 else kv_blocks * NUM_RANKS
    ranks = InstantRanks(coordinator, len(each), tp)
    coordinator.attach(ranks)  # type: ignore[arg-type]
    loaded = [
        engine_pb2.EngineLoaded(
            process_incarnation=f"life of {rank}",
            transfer_address=f"host:{rank}",
            kv_blocks_total=count,
            num_layers=2,
            num_kv_heads=num_kv_heads,
            head_dim=8,
            device="cpu",
            dtype="fp32",
        )
        for rank, count in enumerate(each)
    ]
    coordinator.on_formed(1, loaded)
    return coordinator, ranks


def reserve(
    name: str, asked_at_us: int, num_tokens: int, max_tokens: int = 64
) -> decode_service_pb2.ReserveKv:
    made = decode_service_pb2.ReserveKv(
        num_prompt_tokens=num_tokens, model_hash="hash", asked_at_us=asked_at_us
    )
    made.attempt.request_id = name
    made.choice.max_tokens = max_tokens
    return made


async def start(coordinator: DecodeCoordinator, request: decode_service_pb2.ReserveKv) -> LiveAttempt:
    live = await coordinator.reserve(request)
    await coordinator.commit(live, decode_service_pb2.StartDecode(first_token_id=1))
    return live


async def test_control_of_64_rows_is_a_small_part_of_a_step() -> None:
    coordinator, ranks = make(2_000)
    lives = [await start(coordinator, reserve(f"r{index}", index, 300, 200)) for index in range(64)]
    async with asyncio.timeout(50):
        for live in lives:
            assert [one.token.index async for one in coordinator.tokens(live)] == list(range(1, 200))
            coordinator.release(live)
    load = cluster_pb2.WorkerLoad()
    coordinator.fill_load(load)
    assert 0 < load.control_share < 0.05
    assert not any(plan.blocks_used for plan in ranks.plans)


async def test_ranks_are_told_how_many_blocks_they_use_when_asked_to_check() -> None:
    coordinator, ranks = make(20, debug=True)
    live = await start(coordinator, reserve("r", 1, 256, 100))
    assert list(ranks.plans[0].blocks_used) == [3, 2]
    async with asyncio.timeout(20):
        assert len([one async for one in coordinator.tokens(live)]) == 99
    coordinator.release(live)
    await asyncio.sleep(0)
    assert list(ranks.plans[-1].blocks_used) == [0, 0]
    assert max(plan.blocks_used[0] for plan in ranks.plans) == 4


async def test_who_found_no_room_keeps_its_place_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 blocks on each rank: 10 are held, 18 are waited for, and 9 come later again and again."""
    monkeypatch.setattr(admitting, "LINE_LEASE_S", 0.5)
    coordinator, _ = make(20)
    await coordinator.reserve(reserve("first", 1, 16 * 64, 64))
    long = reserve("long", 2, 34 * 64, 64)
    with pytest.raises(Unavailable, match="no KV room"):
        await coordinator.reserve(long)
    for index in range(MAX_PASSED):
        coordinator.release(await coordinator.reserve(reserve(f"s{index}", 3 + index, 16 * 64)))
    with pytest.raises(Unavailable, match="no KV room"):
        await coordinator.reserve(reserve("one too many", 50, 16 * 64))
    await asyncio.sleep(0.6)  # the lease on its place
    coordinator.release(await coordinator.reserve(reserve("later", 99, 16 * 64, 64)))


async def test_who_is_more_urgent_takes_the_room_of_one_that_is_not() -> None:
    coordinator, _ = make(5)
    usual = await coordinator.reserve(reserve("usual", 1_000, 8 * 64, 64))
    late = reserve("late", 2_000, 8 * 64, 64)
    with pytest.raises(Unavailable, match="no KV room"):
        await coordinator.reserve(late)
    late.priority = 1
    late.attempt.request_id = "urgent"
    await coordinator.reserve(late)
    assert usual.error is not None
    assert usual.error.reason == "PREEMPTED"
    assert usual.received == {0, 1}  # all of its KV is there; it is told all the same, and not admitted
    with pytest.raises(Unavailable, match="to an earlier request"):
        await coordinator.commit(usual, decode_service_pb2.StartDecode(first_token_id=1))


async def test_metrics_count_steps_tokens_and_preemptions() -> None:
    coordinator, _ = make(5)
    registry = CollectorRegistry()
    for collector in coordinator._metrics.collectors:
        registry.register(collector)
    live = await start(coordinator, reserve("early", 1_000, 4 * 64, 10))
    async with asyncio.timeout(20):
        assert len([one async for one in coordinator.tokens(live)]) == 9
    coordinator.release(live)
    await coordinator.reserve(reserve("late", 2_000, 8 * 64, 64))
    await coordinator.reserve(reserve("earlier", 1_500, 8 * 64, 64))
    now = registry.get_sample_value
    assert now("sps2_generation_tokens_total") == 9
    steps = now("sps2_step_seconds_count")
    assert steps is not None
    assert steps >= 9
    assert now("sps2_step_seconds_sum") == pytest.approx(steps * STEP_S)
    assert now("sps2_preemptions_total") == 1


async def refused(request: decode_service_pb2.ResizeAttemptRequest) -> ServiceError:
    """What the leader of two ranks makes of it, while "live", of three blocks, decodes."""
    coordinator, _ = make(20)
    live = await start(coordinator, reserve("live", 1, 128, 1_000))
    with pytest.raises(ServiceError) as caught:
        await coordinator.resize(request)
    coordinator.release(live)
    return caught.value


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"request_id": "other", "degree": 1}, NotFound),
        ({"request_id": "live", "degree": 3}, InvalidArgument),
        ({"request_id": "live", "degree": 0}, InvalidArgument),
        ({"request_id": "live", "degree": 1, "ranks": [2]}, InvalidArgument),
        ({"request_id": "live", "degree": 2, "ranks": [1, 1]}, InvalidArgument),
        ({"request_id": "live", "degree": 1, "attempt_number": 7}, Aborted),
    ],
)
async def test_what_is_refused(options: dict[str, object], kind: type[ServiceError]) -> None:
    request = decode_service_pb2.ResizeAttemptRequest(**options)  # type: ignore[arg-type]
    assert isinstance(await refused(request), kind)


async def test_a_request_of_less_than_a_block_cannot_be_spread() -> None:
    coordinator, _ = make(20)
    live = await start(coordinator, reserve("short", 1, 10, 20))
    with pytest.raises(FailedPrecondition, match="fewer KV blocks"):
        await coordinator.resize(decode_service_pb2.ResizeAttemptRequest(request_id="short", degree=2))
    coordinator.release(live)


async def test_a_resize_returns_when_tokens_come_from_where_it_led() -> None:
    coordinator, ranks = make(20)
    live = await start(coordinator, reserve("live", 1, 512, 300))
    assert live.row.tenant.spread.holders == (0, 1)
    async with asyncio.timeout(20):
        done = await coordinator.resize(decode_service_pb2.ResizeAttemptRequest(request_id="live", degree=1))
    assert (list(done.holders), done.num_blocks_moved) == ([0], 4)
    assert done.longest_gap_s > 0
    moves = [move for plan in ranks.plans for one in plan.moves for move in one.moves]
    assert [(move.source, move.target, move.num_prompt_blocks) for move in moves] == [(1, 0, 4)]
    assert live.shards[0][:2] == (0, 0)
    coordinator.release(live)


async def test_a_fenced_leader_gives_no_room_and_serves_on() -> None:
    coordinator, ranks = make(8)
    live = await coordinator.reserve(reserve("one", 1, 64))
    ranks.fenced = True
    with pytest.raises(Unavailable, match="lease"):
        await coordinator.reserve(reserve("two", 2, 64))
    await coordinator.commit(live, decode_service_pb2.StartDecode(first_token_id=7))
    assert [token async for token in coordinator.tokens(live)]
    coordinator.release(live)


async def test_a_fenced_follower_fences_its_group() -> None:
    """To the router it is the same: no failure of the attempt, but a group to come again to."""
    coordinator, ranks = make(8)
    ranks.fenced_follower = 1
    with pytest.raises(Unavailable) as refused:
        await coordinator.reserve(reserve("two", 2, 64 * 8))
    assert (refused.value.reason, refused.value.metadata) == ("FENCED", {"component": "decode-0"})
    assert refused.value.retry_after
    ranks.fenced_follower = None
    coordinator.release(await coordinator.reserve(reserve("three", 3, 64 * 8)))


async def test_tensor_ranks_stand_where_one_rank_would() -> None:
    """Two sequence indices of two ranks each; the first has room for 6 blocks, as its second rank does."""
    coordinator, _ = make(9, 6, 4, 5, tp=2, num_kv_heads=4)
    with pytest.raises(FailedPrecondition, match="REQUEST_TOO_LARGE"):
        await coordinator.reserve(reserve("too large", 1, 9 * 64, 2 * 64))
    live = await coordinator.reserve(reserve("fits", 2, 8 * 64, 64))
    shards = live.reserve.placement.shards
    assert [(one.rank, one.token_begin, one.head_begin, one.head_end) for one in shards] == [
        (2, 0, 0, 2),
        (0, 256, 0, 2),
        (3, 0, 2, 4),
        (1, 256, 2, 4),
    ]
    assert {(one.rank, one.transfer_address, one.fence.process_incarnation) for one in shards} == {
        (rank, f"host:{rank}", f"life of {rank}") for rank in range(4)
    }
    live.received.discard(3)
    start_decode = asyncio.ensure_future(
        coordinator.commit(live, decode_service_pb2.StartDecode(first_token_id=1))
    )
    await asyncio.sleep(0)
    assert not start_decode.done(), "one tensor rank lacks its KV"
    coordinator.on_event(3, engine_pb2.EngineEvent(row_received=engine_pb2.RowReceived(row=live.row.row_id)))
    async with asyncio.timeout(20):
        await start_decode
        assert [one.token.index async for one in coordinator.tokens(live)] == list(range(1, 64))
        with pytest.raises(NotFound):
            await coordinator.resize(
                decode_service_pb2.ResizeAttemptRequest(request_id="gone", degree=2, ranks=[0, 1])
            )
        with pytest.raises(InvalidArgument, match="below 2"):
            await coordinator.resize(
                decode_service_pb2.ResizeAttemptRequest(request_id="gone", degree=2, ranks=[1, 2])
            )
    coordinator.release(live)


async def test_a_drain_finishes_what_is_there_and_refuses_the_rest() -> None:
    coordinator, _ = make(20)
    live = await start(coordinator, reserve("one", 1, 128, 50))
    waiting = await coordinator.reserve(reserve("its prompt is still computed", 2, 128, 50))
    drained = asyncio.create_task(coordinator.drain())
    await asyncio.sleep(0)
    with pytest.raises(Unavailable) as caught:
        await coordinator.reserve(reserve("new", 3, 128))
    assert (caught.value.reason, caught.value.metadata["component"]) == ("GROUP_DRAINING", "decode-0")
    async with asyncio.timeout(20):
        await coordinator.commit(waiting, decode_service_pb2.StartDecode(first_token_id=1))
        for one in (live, waiting):
            assert len([token async for token in coordinator.tokens(one)]) == 49
            assert not drained.done()
            coordinator.release(one)
        await drained


async def test_what_is_handed_back_ends_behind_its_tokens_and_frees_all() -> None:
    coordinator, ranks = make(20, debug=True)
    live = await start(coordinator, reserve("decodes", 1, 128, 500))
    waiting = await coordinator.reserve(reserve("its prompt is still computed", 2, 128, 50))
    drained, given = asyncio.create_task(coordinator.drain()), []

    async def read() -> None:
        async for token in coordinator.tokens(live):
            given.append(token.token.index)
            if len(given) == 5:
                assert coordinator.hand_back() == 2

    async with asyncio.timeout(20):
        with pytest.raises(Unavailable, match="decode-0 is draining") as caught:
            await read()
        await drained
    assert caught.value.reason == "GROUP_DRAINING"
    assert given == list(range(1, len(given) + 1))
    assert waiting.failed.is_set()
    await asyncio.sleep(0)
    assert list(ranks.plans[-1].blocks_used) == [0, 0]


async def test_a_span_for_each_rank_beneath_the_routers() -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing("sps2-decode", "decode-0/0", SimpleSpanProcessor(exporter))
    coordinator, _ = make(20, tracing=tracing)
    place = tracing.request(None)
    assert place is not None
    current_place.set(place)
    live = await start(coordinator, reserve("r", 1, 256, 10))
    async with asyncio.timeout(20):
        assert len([one async for one in coordinator.tokens(live)]) == 9
    coordinator.release(live)
    coordinator.release(live)
    spans = exporter.get_finished_spans()
    assert [span.name for span in spans] == ["decode rank 0", "decode rank 1"]
    for rank, span in enumerate(spans):
        facts = dict(span.attributes or {})
        assert span.parent is not None
        assert span.parent.span_id == place.span_id
        assert (facts["sps2.rank"], facts["sps2.request_id"], facts["sps2.attempt"]) == (rank, "r", 0)
        assert facts["sps2.is_home"] == (rank == live.row.home)
        assert facts["sps2.num_steps"] == 9
        assert facts["sps2.step_seconds"] == pytest.approx(9 * STEP_S)
        assert span.start_time is not None
        assert span.end_time is not None
        assert 0 < span.end_time - span.start_time < 20e9
