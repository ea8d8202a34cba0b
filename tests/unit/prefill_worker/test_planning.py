"""The leader's choice of a schedule, and that every rank follows it or refuses."""

import pytest

from sps2.internal.v1 import engine_pb2
from sps2_engine.attention.cost_model import Choice, Exchange
from sps2_engine.mesh import TensorShare
from sps2_layout.attention import Attention
from sps2_layout.profiles import EXACT, Ladder, Profile, paper_profile
from sps2_layout.wire import pack_attention
from sps2_prefill_worker.planning import TO_WIRE, PlannedPrompt, PromptPlanner, Sharing, follow, spans_of

LOADED = engine_pb2.EngineLoaded(device="cpu", dtype="fp32", num_q_heads=8, num_kv_heads=2, head_dim=64)
DENSE_QUERIES = Ladder("dense", (Profile(8, ((1, 1), (8, 4)), dense_queries=True, tail=5),), 1)
PAPER = Ladder("paper", (paper_profile(4),), 1)
LADDERS = [EXACT, DENSE_QUERIES, PAPER]


def planner(num_ranks: int, choice: Choice) -> PromptPlanner:
    return PromptPlanner.of([LOADED] * num_ranks, choice, threads=1)


def told(
    ladder: Ladder, num_tokens: int, num_ranks: int, choice: Choice, num_generated: int = 0
) -> list[engine_pb2.RunPrefill]:
    """What each rank of a group is told of a text whose tokens are their positions."""
    attention = Attention.admit(ladder, num_tokens - num_generated)
    planned = planner(num_ranks, choice).plan(attention, num_tokens)
    packed = pack_attention(attention)
    runs = [engine_pb2.RunPrefill(attention=packed, num_prompt_tokens=num_tokens) for _ in range(num_ranks)]
    for rank, run in enumerate(runs):
        planned.assign(rank, run, range(num_tokens))
    return runs


@pytest.mark.parametrize("ladder", LADDERS, ids=lambda ladder: ladder.name)
@pytest.mark.parametrize("choice", ["auto", "heads", "kv"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(("num_tokens", "num_generated"), [(1, 0), (5, 0), (333, 0), (333, 150), (5, 4)])
def test_ranks_are_told_one_schedule_and_each_token_once(
    ladder: Ladder, choice: Choice, num_ranks: int, num_tokens: int, num_generated: int
) -> None:
    runs = told(ladder, num_tokens, num_ranks, choice, num_generated)
    assert len({run.exchange for run in runs}) == 1
    assert sorted(token for run in runs for token in run.token_ids) == list(range(num_tokens))
    shape = planner(num_ranks, choice).model
    for rank, run in enumerate(runs):
        spans = spans_of(run)
        assert [token for span in spans for token in range(span.begin, span.end)] == list(run.token_ids)
        assert len(run.token_ids) <= follow(run, rank, num_ranks, shape).most_tokens


@pytest.mark.parametrize("ladder", [EXACT, DENSE_QUERIES], ids=lambda ladder: ladder.name)
def test_kv_gives_a_rank_a_block_from_either_end(ladder: Ladder) -> None:
    first, second = (spans_of(run) for run in told(ladder, 320, 2, "kv"))
    assert [(span.begin, span.end) for span in first] == [(0, 80), (240, 320)]
    assert [(span.begin, span.end) for span in second] == [(80, 160), (160, 240)]


@pytest.mark.parametrize(("choice", "exchange"), [("heads", "heads"), ("kv", "kv")])
def test_an_explicit_choice_holds_for_every_mask(choice: Choice, exchange: Exchange) -> None:
    for ladder in LADDERS:
        assert {run.exchange for run in told(ladder, 333, 2, choice)} == {TO_WIRE[exchange]}


def test_a_short_prompt_is_chosen_the_schedule_with_fewer_exchanges() -> None:
    """Latency is all that counts there, and `kv` returns nothing; a rank alone has nothing to choose."""
    assert told(EXACT, 64, 2, "auto")[0].exchange == engine_pb2.EXCHANGE_KV
    assert told(EXACT, 64, 1, "auto")[0].exchange == engine_pb2.EXCHANGE_HEADS


def test_a_rank_that_would_plan_otherwise_refuses() -> None:
    run = told(EXACT, 320, 2, "kv")[0]
    shape = planner(2, "kv").model
    run.exchange = engine_pb2.EXCHANGE_HEADS
    with pytest.raises(ValueError, match="rank 0 was given"):
        follow(run, 0, 2, shape)
    run.exchange = engine_pb2.EXCHANGE_UNSPECIFIED
    with pytest.raises(ValueError, match="not known"):
        follow(run, 0, 2, shape)


@pytest.mark.parametrize("ladder", LADDERS, ids=lambda ladder: ladder.name)
@pytest.mark.parametrize(("tp", "num_replicas"), [(2, 1), (4, 2)])
def test_tensor_ranks_are_told_the_same_tokens(ladder: Ladder, tp: int, num_replicas: int) -> None:
    """Of 8/2 heads: 4 of the query heads and one KV head to a rank, then 2 and a KV head that another rank has too."""
    attention = Attention.admit(ladder, 333)
    planner = PromptPlanner.of([LOADED] * 4, "auto", threads=1, tp=tp)
    planned = planner.plan(attention, 333)
    packed = pack_attention(attention)
    runs = [engine_pb2.RunPrefill(attention=packed, num_prompt_tokens=333) for _ in range(4)]
    for rank, run in enumerate(runs):
        planned.assign(rank, run, range(333))
        shape = planner.model.of_share(TensorShare(rank % tp, tp))
        followed = follow(run, rank // tp, 4 // tp, shape)
        assert (followed.num_q_heads, followed.num_kv_heads) == (8 // tp, 1)
        assert run.token_ids == runs[rank // tp * tp].token_ids
    assert sorted(token for run in runs[::tp] for token in run.token_ids) == list(range(333))
    assert planned.most_kept == -(-planned.plan.most_tokens // num_replicas)


@pytest.mark.parametrize("choice", ["auto", "heads", "kv"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_behind_a_cached_beginning_the_rest_is_split_over_all_ranks(choice: Choice, num_ranks: int) -> None:
    attention = Attention.admit(PAPER, 333)
    planned = planner(num_ranks, choice).plan(attention, 333, [256, *[0] * (num_ranks - 1)])
    told: list[int] = []
    for rank in range(num_ranks):
        run = engine_pb2.RunPrefill(attention=pack_attention(attention), num_prompt_tokens=333)
        run.cached.parts.add(run=1, token_begin=0, token_end=256)
        planned.assign(rank, run, range(333))
        follow(run, rank, num_ranks, planner(num_ranks, choice).model)
        told += run.token_ids
    assert sorted(told) == list(range(256, 333))
    assert planned.plan.layout.is_exact


COSTS = {
    "num_layers": 4,
    "linear_flops_per_token": 6_000_000,
    "slice_flops": 4_000_000_000,
    "kv_blocks_total": 64,
}
"""About the demo model, in fp32 on a core."""


def sized(num_ranks: int, sharing: Sharing = "auto", **changes: int) -> PromptPlanner:
    loaded = engine_pb2.EngineLoaded()
    loaded.CopyFrom(LOADED)
    for name, value in (COSTS | changes).items():
        setattr(loaded, name, value)
    return PromptPlanner.of([loaded] * num_ranks, "auto", threads=1, sharing=sharing)


def exact(planner: PromptPlanner, num_tokens: int) -> PlannedPrompt:
    return planner.plan(Attention(num_tokens, num_tokens), num_tokens)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_prompts_are_shared_from_some_length_on(num_ranks: int) -> None:
    """Where compute is four times what exchanges add to it; more ranks want longer prompts."""
    planner = sized(num_ranks)
    lengths = range(16, 1600, 16)  # between them what is rounded up to whole slices decides
    alone = [exact(planner, num_tokens).alone for num_tokens in lengths]
    border = alone.index(False)
    assert not any(alone[border:])
    assert {2: 60, 4: 150, 8: 300}[num_ranks] < lengths[border] < {2: 200, 4: 450, 8: 1000}[num_ranks]
    assert exact(planner, 2000).plan.num_ranks == num_ranks


def test_what_all_share_and_what_has_no_room_on_one_rank_is_shared() -> None:
    assert exact(sized(2), 65).alone
    assert not exact(sized(2, sharing="all"), 65).alone
    assert not exact(sized(2, kv_blocks_total=1), 65).alone
    assert not exact(sized(1), 65).alone, "there is nobody to share it with"


def test_a_prompt_is_short_by_what_its_busiest_rank_computes() -> None:
    for planner in (sized(1), sized(2)):
        longest = planner.short_tokens
        assert 0 < exact(planner, longest - 8).interlude_flops <= 2 * COSTS["slice_flops"]
        assert exact(planner, longest + 8).interlude_flops == 0
    assert sized(2).short_tokens > sized(1).short_tokens
    assert PromptPlanner.of([LOADED] * 2, "auto", threads=1).short_tokens == 0, "nobody knows what it costs"


@pytest.mark.parametrize("alone_on", [0, 1])
def test_a_rank_alone_is_told_the_whole_prompt_and_the_others_none(alone_on: int) -> None:
    planned = exact(sized(2), 65)
    runs = [
        engine_pb2.RunPrefill(attention=pack_attention(Attention(65, 65)), num_prompt_tokens=65)
        for _ in range(2)
    ]
    for rank, run in enumerate(runs):
        planned.assign(rank, run, range(65), alone_on)
    assert [list(run.token_ids) for run in runs] == [
        list(range(65)) if rank == alone_on else [] for rank in range(2)
    ]
    assert {(run.alone_on, run.interlude_flops > 0) for run in runs} == {(alone_on, True)}
    assert follow(runs[alone_on], 0, 1, sized(2).model).num_ranks == 1
