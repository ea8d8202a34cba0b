"""CSA over 1 to 8 ranks, by each schedule, equals the mask's attention and posts what the plan counts."""

import pytest
import torch

from sps2_engine.attention.csa_plan import CsaPlan
from sps2_engine.attention.csa_schedule import CsaSchedule
from sps2_engine.attention.kv_schedule import KvPlan
from sps2_engine.collectives import Communicator, LeadingRanks
from sps2_engine.slices import Slicer
from sps2_kernels import reference
from sps2_layout.layout import exact_layout
from sps2_layout.profiles import Profile
from support.csa_cases import (
    ELEMENT_BYTES,
    HEAD_DIM,
    PLANS,
    PROFILES,
    SCALE,
    draw,
    oracle,
    run_plan,
)
from support.ranks import run_ranks

TINY_CHUNKS = 64
"""Bytes; cuts even a short prompt into as many chunks as there are."""


@pytest.mark.parametrize("schedule", PLANS)
@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize(
    ("num_ranks", "heads", "num_tokens"),
    [(1, (14, 2), 150), (2, (14, 2), 150), (4, (14, 2), 7), (8, (3, 1), 150)],
)
def test_equals_the_mask(
    schedule: str, name: str, num_ranks: int, heads: tuple[int, int], num_tokens: int
) -> None:
    layout, layer = PROFILES[name].resolve(num_tokens), num_tokens % 3
    inputs = draw(num_tokens, *heads)
    # Chunks of every size come by: whole levels in the longer prompt of the wider heads, else the smallest.
    chunk_bytes = TINY_CHUNKS if heads == (3, 1) else 1 << 14
    plan = PLANS[schedule](layout, num_ranks, *heads, HEAD_DIM, ELEMENT_BYTES, chunk_bytes)

    outcome = run_plan(plan, layer, inputs, pipelined=num_tokens > 7)

    torch.testing.assert_close(outcome.o.double(), oracle(layout, layer, inputs), atol=3e-6, rtol=1e-5)
    assert outcome.posted == [plan.sent_bytes(rank, layer) for rank in range(num_ranks)]


@pytest.mark.parametrize("schedule", PLANS)
@pytest.mark.parametrize("name", PROFILES)
def test_equals_the_mask_of_an_extended_layout(schedule: str, name: str) -> None:
    """The last shard has more tokens than the others: 75 of them were generated after the prompt."""
    layout = PROFILES[name].resolve(150).extended(225)
    inputs = draw(225, 14, 2)
    plan = PLANS[schedule](layout, 4, 14, 2, HEAD_DIM, ELEMENT_BYTES, 1 << 14)
    outcome = run_plan(plan, 1, inputs)
    torch.testing.assert_close(outcome.o.double(), oracle(layout, 1, inputs), atol=3e-6, rtol=1e-5)
    assert plan.last_rank == plan.owner(plan.num_blocks - 1)


@pytest.mark.parametrize("heads", [(8, 8), (8, 4), (14, 2), (5, 1)])
@pytest.mark.parametrize("schedule", PLANS)
def test_chunks_change_neither_bytes_nor_outputs(schedule: str, heads: tuple[int, int]) -> None:
    layout = PROFILES["two levels, tail, sinks"].resolve(300)
    inputs = draw(300, *heads)
    whole, cut = (
        PLANS[schedule](layout, 4, *heads, HEAD_DIM, ELEMENT_BYTES, chunk_bytes)
        for chunk_bytes in (1 << 30, TINY_CHUNKS)
    )
    assert len(whole.stages()) < len(cut.stages()) or heads[1] == 1
    assert whole.bytes_per_layer(1) == cut.bytes_per_layer(1)
    one, other = run_plan(whole, 1, inputs), run_plan(cut, 1, inputs)
    torch.testing.assert_close(one.o, other.o, atol=1e-6, rtol=1e-5)
    assert one.posted == other.posted


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("num_tokens", [3, 130])
@pytest.mark.parametrize("schedule", ["heads", "kv", "kv folded"])
def test_exact_slices_at_any_degree(schedule: str, num_ranks: int, num_tokens: int) -> None:
    layout = exact_layout(num_tokens, 2 * num_ranks if schedule == "kv folded" else num_ranks)
    inputs = draw(num_tokens, 14, 2)
    plan = PLANS[schedule.split(maxsplit=1)[0]](layout, num_ranks, 14, 2, HEAD_DIM, ELEMENT_BYTES)
    outcome = run_plan(plan, 0, inputs)
    dense, _ = reference.segment_attention(*inputs, 0, SCALE)
    torch.testing.assert_close(outcome.o.double(), dense, atol=3e-6, rtol=1e-5)
    assert sum(outcome.posted) == plan.bytes_per_layer()


@pytest.mark.parametrize("schedule", PLANS)
@pytest.mark.parametrize("name", ["exact", "paper", "two levels, tail, sinks"])
def test_earlier_outputs_ignore_later_tokens(schedule: str, name: str) -> None:
    """Causality across ranks: changing token 99 leaves the outputs before it bit-equal."""
    layout = PROFILES[name].resolve(150)
    inputs = draw(150, 4, 2)
    plan = PLANS[schedule](layout, 4, 4, 2, HEAD_DIM, ELEMENT_BYTES, TINY_CHUNKS)
    before = run_plan(plan, 1, inputs).o
    for x in inputs:
        x[99] += 1.0
    after = run_plan(plan, 1, inputs).o
    assert torch.equal(before[:99], after[:99])
    assert not torch.equal(before[99:], after[99:])


@pytest.mark.parametrize("schedule", PLANS)
def test_inputs_are_not_mutated(schedule: str) -> None:
    layout = PROFILES["two levels, tail, sinks"].resolve(150)
    inputs = draw(150, 4, 2)
    copies = [x.clone() for x in inputs]
    run_plan(PLANS[schedule](layout, 2, 4, 2, HEAD_DIM, ELEMENT_BYTES), 0, inputs)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("schedule", PLANS)
def test_constant_values_and_extreme_scores_stay_exact(schedule: str) -> None:
    """V = 1 gives 1, whatever the scores: nothing is counted twice and nothing overflows."""
    layout = PROFILES["two levels, tail, sinks"].resolve(150)
    q, k, v = draw(150, 4, 2)
    inputs = (q * 1e4, k, torch.ones_like(v))
    o = run_plan(PLANS[schedule](layout, 4, 4, 2, HEAD_DIM, ELEMENT_BYTES), 2, inputs).o
    torch.testing.assert_close(o, torch.ones_like(o), atol=1e-5, rtol=0)


def test_mqa_and_more_ranks_than_kv_heads_than_strides() -> None:
    """G = 8 ranks share one KV head, and a stride is longer than there are heads."""
    layout = Profile(8, ((1, 1), (8, 8)), tail=4).resolve(260)
    for heads in ((4, 1), (8, 2), (1, 1)):
        inputs = draw(260, *heads)
        for kind in (CsaPlan, KvPlan):
            plan = kind(layout, 8, *heads, HEAD_DIM, ELEMENT_BYTES, TINY_CHUNKS)
            o = run_plan(plan, 5, inputs).o
            torch.testing.assert_close(o.double(), oracle(layout, 5, inputs), atol=3e-6, rtol=1e-5)


class StoppedError(Exception):
    """All ranks have agreed to stop."""


@pytest.mark.parametrize("num_group", [4, 5])
@pytest.mark.parametrize("name", ["paper", "two levels, tail, sinks", "unseen groups"])
@pytest.mark.parametrize("schedule", PLANS)
def test_slices_and_idle_ranks_change_nothing(schedule: str, name: str, num_group: int) -> None:
    """Every rank of the group agrees equally often, whatever it has to do, and the outputs stay."""
    layout, heads = PROFILES[name].resolve(150), (4, 2)
    plan = PLANS[schedule](layout, 4, *heads, HEAD_DIM, ELEMENT_BYTES, TINY_CHUNKS)
    inputs = draw(150, *heads)
    tokens = [torch.cat([torch.arange(one.begin, one.end) for one in plan.spans(r)]) for r in range(4)]

    def on_rank(group: Communicator) -> tuple[torch.Tensor, int, int]:
        agreed = 0

        def end_slice() -> None:
            nonlocal agreed
            agreed += 1
            assert not group.agree(False)

        own = tokens[group.rank] if group.rank < 4 else torch.arange(0)
        slicer = Slicer(plan.flops_per_layer(1) // 100, end_slice)
        schedule = CsaSchedule(plan, LeadingRanks(group, 4), SCALE, slicer)
        outputs = [schedule.attend(layer, *(x[own] for x in inputs)) for layer in (1, 2)]
        # Whoever says stop at the end of which slice: all stop there, with exchanges under way.
        left = agreed // 3

        def stop() -> None:
            nonlocal left
            left -= 1
            if group.agree(left <= 0 and group.rank == 0):
                raise StoppedError

        cut_short = CsaSchedule(plan, LeadingRanks(group, 4), SCALE, Slicer(slicer.slice_flops, stop))
        with pytest.raises(StoppedError):
            cut_short.attend(1, *(x[own] for x in inputs))
        assert not group.agree(False)
        return outputs[0], agreed, left

    results = run_ranks(num_group, on_rank)
    assert len({agreed for _, agreed, _ in results}) == 1
    assert results[0][1] >= 20
    assert len({left for _, _, left in results}) == 1
    expected = oracle(layout, 1, inputs)
    for own, (part, _, _) in zip(tokens, results, strict=False):
        torch.testing.assert_close(part.double(), expected[own], atol=3e-6, rtol=1e-5)
