"""The leader of a prefill group: what it tells the ranks of a prompt, and what it refuses."""

import asyncio
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field

import pytest

from sps2.internal.v1 import engine_pb2, prefill_service_pb2
from sps2.v1 import cluster_pb2
from sps2_engine.attention.cost_model import Choice
from sps2_layout.attention import Attention
from sps2_layout.block_hash import BLOCK_TOKENS
from sps2_layout.profiles import EXACT, Ladder, Profile
from sps2_layout.wire import pack_attention
from sps2_prefill_worker.coordinator import PrefillCoordinator
from sps2_prefill_worker.fetch_costs import BY_COST, FetchCosts
from sps2_prefill_worker.holders import PLAINTEXT_HOLDERS, Holders
from sps2_service.errors import FailedPrecondition, InvalidArgument, Unavailable
from sps2_service.ranks.group import GroupState

NUM_TOKENS = 10 * BLOCK_TOKENS
TIMEOUT_S = 10.0


@dataclass
class StandInGroup:
    """A formed group that keeps what its ranks are sent."""

    size: int
    name: str = "prefill-0"
    state: GroupState = GroupState.FORMED
    missing: str = ""
    epoch: int = 1
    sent: dict[int, list[engine_pb2.EngineCommand]] = field(default_factory=dict)

    fenced: bool = False
    told: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when every rank has been sent something."""

    def check_lease(self) -> None:
        if self.fenced:
            raise Unavailable("FENCED", "the leader's lease does not hold")

    def send(self, rank: int, command: engine_pb2.EngineCommand) -> None:
        self.sent.setdefault(rank, []).append(command)
        if len(self.sent) == self.size:
            self.told.set()

    def broadcast(self, command: engine_pb2.EngineCommand) -> None:
        for rank in range(self.size):
            self.send(rank, command)


def make(
    choice: Choice,
    num_ranks: int,
    kv_blocks: int,
    fetch: FetchCosts = BY_COST,
    holders: Holders = PLAINTEXT_HOLDERS,
) -> tuple[PrefillCoordinator, StandInGroup]:
    coordinator = PrefillCoordinator(choice, fetch_costs=fetch, holders=holders)
    group = StandInGroup(num_ranks)
    coordinator.attach(group)  # type: ignore[arg-type]
    loaded = engine_pb2.EngineLoaded(
        device="cpu",
        dtype="fp32",
        num_q_heads=8,
        num_kv_heads=2,
        head_dim=64,
        kv_blocks_total=kv_blocks,
        slice_flops=7,
    )
    coordinator.on_formed(1, [loaded] * num_ranks)
    return coordinator, group


def request() -> prefill_service_pb2.PrefillRequest:
    made = prefill_service_pb2.PrefillRequest(
        token_ids=range(NUM_TOKENS), attention=pack_attention(Attention.admit(EXACT, NUM_TOKENS))
    )
    made.attempt.request_id = "one"
    made.placement.shards.add(token_begin=0, token_end=NUM_TOKENS)
    return made


async def first_commands(
    coordinator: PrefillCoordinator,
    group: StandInGroup,
    asked: prefill_service_pb2.PrefillRequest | None = None,
) -> dict[int, list[engine_pb2.EngineCommand]]:
    """What the ranks are sent of a request whose call ends as soon as it has begun."""
    async with aclosing(coordinator.prefill(asked or request())) as events:
        waiting = asyncio.ensure_future(anext(events))
        async with asyncio.timeout(TIMEOUT_S):
            await group.told.wait()
        waiting.cancel()
        await asyncio.wait([waiting])
    return group.sent


@pytest.mark.parametrize("choice", ["heads", "kv"])
def test_every_rank_is_told_the_schedule_and_its_tokens_and_the_cancel(choice: Choice) -> None:
    sent = asyncio.run(first_commands(*make(choice, 2, kv_blocks=5)))
    runs = [commands[0].run_prefill for commands in sent.values()]
    assert {run.exchange for run in runs} == {engine_pb2.Exchange.Value(f"EXCHANGE_{choice.upper()}")}
    assert [len(run.spans) for run in runs] == [{"heads": 1, "kv": 2}[choice]] * 2
    assert sorted(token for run in runs for token in run.token_ids) == list(range(NUM_TOKENS))
    assert {run.slice_flops for run in runs} == {7}
    assert [commands[1].WhichOneof("command") for commands in sent.values()] == ["cancel_prefill"] * 2


@pytest.mark.parametrize("choice", ["heads", "kv"])
def test_a_prompt_that_no_rank_has_room_for_is_refused(choice: Choice) -> None:
    coordinator, _ = make(choice, 2, kv_blocks=4)

    async def ask() -> None:
        await anext(coordinator.prefill(request()))

    with pytest.raises(FailedPrecondition, match="raise --kv-tokens"):
        asyncio.run(ask())


def test_a_fenced_leader_takes_no_prompt() -> None:
    coordinator, group = make("heads", 2, kv_blocks=5)
    group.fenced = True

    async def ask() -> None:
        await anext(coordinator.prefill(request()))

    with pytest.raises(Unavailable, match="lease"):
        asyncio.run(ask())
    assert group.sent == {}


SPARSE = Ladder("sparse", (Profile(4, ((1, 1), (4, 4)), tail=16),), 1)


@pytest.mark.parametrize(("kv_blocks", "max_tokens"), [(5, 1), (6, 65), (6, 2)])
@pytest.mark.parametrize("choice", ["auto", "heads", "kv"])
def test_what_is_taken_has_room_whenever_it_comes_back(
    choice: Choice, kv_blocks: int, max_tokens: int
) -> None:
    """Ten blocks of prompt on two ranks; under a sparse mask all that is generated lies behind the last shard."""
    attention = Attention.admit(SPARSE, NUM_TOKENS)
    for num_generated in {0, max_tokens // 2, max_tokens - 1}:
        coordinator, group = make(choice, 2, kv_blocks)
        asked = request()
        asked.attention.CopyFrom(pack_attention(attention))
        asked.choice.max_tokens = max_tokens
        asked.choice.generated_token_ids.extend(range(num_generated))
        asked.token_ids.extend(range(num_generated))
        asked.placement.shards[0].token_end += num_generated
        sent = asyncio.run(first_commands(coordinator, group, asked))
        most = max(len(commands[0].run_prefill.token_ids) for commands in sent.values())
        assert most <= kv_blocks * BLOCK_TOKENS


@pytest.mark.parametrize(("kv_blocks", "max_tokens"), [(5, 2), (6, 66)])
def test_what_could_not_come_back_is_refused_at_once(kv_blocks: int, max_tokens: int) -> None:
    coordinator, _ = make("auto", 2, kv_blocks)
    asked = request()
    asked.attention.CopyFrom(pack_attention(Attention.admit(SPARSE, NUM_TOKENS)))
    asked.choice.max_tokens = max_tokens

    async def ask() -> None:
        await anext(coordinator.prefill(asked))

    with pytest.raises(FailedPrecondition, match="lower max_tokens"):
        asyncio.run(ask())


def generated_behind_a_prompt(*generated: int) -> prefill_service_pb2.PrefillRequest:
    """The request, of whose tokens the prompt is as many fewer as were generated."""
    made = request()
    num_prompt = NUM_TOKENS - len(generated)
    made.attention.CopyFrom(pack_attention(Attention.admit(EXACT, num_prompt)))
    made.choice.generated_token_ids.extend(generated)
    return made


def test_what_was_generated_follows_the_prompt() -> None:
    """The mask lies over the prompt alone; each rank is told which tokens are behind it."""
    asked = generated_behind_a_prompt(NUM_TOKENS - 2, NUM_TOKENS - 1)
    sent = asyncio.run(first_commands(*make("auto", 2, kv_blocks=5), asked))
    runs = [commands[0].run_prefill for commands in sent.values()]
    assert sorted(token for run in runs for token in run.token_ids) == list(range(NUM_TOKENS))
    assert [len(run.choice.generated_token_ids) for run in runs] == [2, 2]


@pytest.mark.parametrize(
    "asked",
    [generated_behind_a_prompt(5, NUM_TOKENS - 1), generated_behind_a_prompt(NUM_TOKENS - 1, NUM_TOKENS)],
)
def test_generated_tokens_that_do_not_end_the_text_are_refused(
    asked: prefill_service_pb2.PrefillRequest,
) -> None:
    coordinator, _ = make("auto", 2, kv_blocks=5)

    async def ask() -> None:
        await anext(coordinator.prefill(asked))

    with pytest.raises(InvalidArgument, match="must follow the prompt"):
        asyncio.run(ask())


async def test_a_drain_hands_back_what_computes_and_what_waits() -> None:
    coordinator, group = make("heads", 2, kv_blocks=5)
    second = request()
    second.attempt.request_id = "two"
    calls = [coordinator.prefill(one) for one in (request(), second)]
    async with aclosing(calls[0]), aclosing(calls[1]), asyncio.timeout(TIMEOUT_S):
        waiting = [asyncio.ensure_future(anext(one)) for one in calls]
        await group.told.wait()
        drained = asyncio.create_task(coordinator.drain())
        await asyncio.sleep(0)
        assert not drained.done()
        with pytest.raises(Unavailable, match="prefill-0 is draining"):
            await anext(coordinator.prefill(request()))
        assert coordinator.hand_back() == 2
        for one in waiting:
            with pytest.raises(Unavailable) as caught:
                await one
            assert (caught.value.reason, caught.value.metadata["component"]) == (
                "GROUP_DRAINING",
                "prefill-0",
            )
        await drained
    kinds = [command.WhichOneof("command") for command in group.sent[1]]
    assert kinds == ["run_prefill", "cancel_prefill"], "the one that waited was never begun"


def sized_request(name: str, num_tokens: int) -> prefill_service_pb2.PrefillRequest:
    made = prefill_service_pb2.PrefillRequest(
        token_ids=range(num_tokens), attention=pack_attention(Attention(num_tokens, num_tokens))
    )
    made.attempt.request_id = name
    made.placement.shards.add(token_begin=0, token_end=num_tokens)
    return made


class SilentHolder:
    """Another group that is asked for KV and says nothing until the test has it fail."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.fails = asyncio.Event()

    async def send_prefix(
        self, address: str, request: prefill_service_pb2.SendPrefixRequest, timeout_s: float
    ) -> int:
        self.asked.set()
        async with asyncio.timeout(timeout_s):
            await self.fails.wait()
        raise Unavailable("WORKER_LOST", f"{address} is gone")


async def test_a_prompt_keeps_its_place_while_its_beginning_is_fetched() -> None:
    """The group is idle: one that comes later would else compute first, for as long as it takes."""
    holder = SilentHolder()
    coordinator, group = make("heads", 2, kv_blocks=50, fetch=FetchCosts("always"), holders=holder)
    first, second = sized_request("first", 640), sized_request("second", 640)
    first.block_hashes.extend(b"%d" % index for index in range(10))
    first.prefix_sources.add(group="prefill-1", leader_address="other", num_tokens=512)
    async with AsyncExitStack() as calls, asyncio.timeout(TIMEOUT_S):
        events = [
            await calls.enter_async_context(aclosing(coordinator.prefill(one))) for one in (first, second)
        ]
        waiting = [asyncio.ensure_future(anext(stream)) for stream in events]
        await group.told.wait()
        (command,) = group.sent[0]
        expected = engine_pb2.PrefixExpected(run=command.fetch_prefix.run)
        for rank in range(2):
            report = engine_pb2.PrefillReport(attempt=first.attempt, prefix_expected=expected)
            coordinator.on_event(rank, engine_pb2.EngineEvent(prefill=report))
        await holder.asked.wait()
        load = cluster_pb2.WorkerLoad()
        coordinator.fill_load(load)
        assert (load.num_requests_waiting, load.queued_tokens) == (2, 1280)
        assert begun(group) == []
        group.told.clear()
        holder.fails.set()
        await group.told.wait()
        assert begun(group) == ["first"]
        assert coordinator.fetches.results == {"refused": 1}
        for one in waiting:
            one.cancel()
        await asyncio.wait(waiting)


def begun(group: StandInGroup) -> list[str]:
    commands = group.sent[0]
    return [one.run_prefill.attempt.request_id for one in commands if one.HasField("run_prefill")]


async def test_short_prompts_are_told_to_the_ranks_while_a_long_one_computes() -> None:
    """Each to the rank that has least to do; one that a rank computes alone is begun by its word."""
    coordinator, group = PrefillCoordinator(), StandInGroup(2)
    coordinator.attach(group)  # type: ignore[arg-type]
    loaded = engine_pb2.EngineLoaded(
        device="cpu",
        dtype="fp32",
        num_layers=4,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=64,
        kv_blocks_total=100,
        slice_flops=4_000_000_000,
        linear_flops_per_token=6_000_000,
    )
    coordinator.on_formed(1, [loaded] * 2)
    load = cluster_pb2.WorkerLoad()
    coordinator.fill_load(load)
    assert load.short_prompt_tokens > 1000
    prompts = {"long": 6000, "next long": 6000, "a": 50, "b": 50, "shared": 1000}
    async with AsyncExitStack() as calls, asyncio.timeout(TIMEOUT_S):
        events = {
            name: await calls.enter_async_context(
                aclosing(coordinator.prefill(sized_request(name, num_tokens)))
            )
            for name, num_tokens in prompts.items()
        }
        waiting = {name: asyncio.ensure_future(anext(stream)) for name, stream in events.items()}
        await asyncio.sleep(0)
        runs = [[command.run_prefill for command in group.sent[rank]] for rank in range(2)]
        assert [[run.attempt.request_id for run in told] for told in runs] == [
            ["long", "a", "b", "shared"]
        ] * 2
        assert [[run.number for run in told] for told in runs] == [[1, 2, 3, 4]] * 2
        assert [run.alone_on if run.HasField("alone_on") else None for run in runs[0]] == [None, 0, 1, None]
        assert [len(run.token_ids) for run in runs[0][:3]] == [3000, 50, 0]
        assert [len(run.token_ids) for run in runs[1][:3]] == [3000, 0, 50]

        def report(rank: int, name: str) -> None:
            started = engine_pb2.PrefillReport(started=prefill_service_pb2.PrefillStarted())
            started.attempt.request_id = name
            coordinator.on_event(rank, engine_pb2.EngineEvent(prefill=started))

        for rank in range(2):
            report(rank, "b")
            await asyncio.sleep(0)
            assert waiting["b"].done() is (rank == 1)
        for one in waiting.values():
            one.cancel()
        await asyncio.wait(waiting.values())
