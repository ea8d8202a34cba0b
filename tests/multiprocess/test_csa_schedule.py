"""CSA over 1 to 8 ranks equals the mask's attention, at every degree, and posts exactly what the plan counts."""

import pytest
import torch

from sps2_engine.attention.csa_plan import CsaPlan
from sps2_engine.attention.csa_schedule import CsaSchedule
from sps2_engine.collectives import Communicator
from sps2_kernels import reference
from sps2_layout.layout import Layout, exact_layout
from sps2_layout.profiles import Profile, paper_profile
from support.ranks import run_ranks

HEAD_DIM = 16
SCALE = HEAD_DIM**-0.5

PROFILES = {
    "exact": Profile(8, ((1, 1), (8, 1))),
    "paper": paper_profile(8),
    "two levels, tail, sinks": Profile(8, ((1, 1), (2, 2), (8, 4)), sinks=3, tail=5),
    "dense queries": Profile(8, ((1, 1), (4, 2), (8, 4)), dense_queries=True, sinks=1, tail=2),
    "local only": Profile(8, ((1, 1),), sinks=4, tail=9),
    "unseen groups": Profile(8, ((1, 1), (4, 2)), tail=3),
}

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def draw(layout: Layout, num_q_heads: int, num_kv_heads: int) -> Inputs:
    generator = torch.Generator().manual_seed(layout.num_tokens)
    heads = (num_q_heads, num_kv_heads, num_kv_heads)
    q, k, v = (torch.randn(layout.num_tokens, count, HEAD_DIM, generator=generator) for count in heads)
    return q, k, v


def run_csa(plan: CsaPlan, layer: int, inputs: Inputs) -> tuple[torch.Tensor, int]:
    """Attention of the whole prompt, computed by all ranks, and the bytes they posted."""

    def on_rank(communicator: Communicator) -> tuple[torch.Tensor, int]:
        own = plan.tokens(communicator.rank).slice
        q, k, v = (x[own] for x in inputs)
        o = CsaSchedule(plan, communicator, SCALE).attend(layer, q, k, v)
        return o, communicator.bytes_posted["all_to_all"]

    results = run_ranks(plan.num_ranks, on_rank)
    return torch.cat([o for o, _ in results]), sum(posted for _, posted in results)


def oracle(layout: Layout, layer: int, inputs: Inputs) -> torch.Tensor:
    q, k, v = inputs
    fold = q.shape[1] // k.shape[1]
    outputs = []
    for kv_head in range(k.shape[1]):
        mask = reference.csa_mask(
            layout.num_tokens,
            layout.shard_tokens,
            [(level.group, level.stride) for level in layout.levels],
            kv_head,
            layer,
            dense_queries=layout.dense_queries,
            sinks=layout.sinks,
            tail=layout.tail,
        )
        heads = slice(kv_head * fold, (kv_head + 1) * fold)
        kv = slice(kv_head, kv_head + 1)
        outputs.append(reference.masked_attention(q[:, heads], k[:, kv], v[:, kv], mask, SCALE)[0])
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("heads", [(3, 1), (14, 2)])
@pytest.mark.parametrize("num_tokens", [7, 150])
def test_equals_the_mask(name: str, num_ranks: int, heads: tuple[int, int], num_tokens: int) -> None:
    layout, layer = PROFILES[name].resolve(num_tokens), num_tokens % 3
    inputs = draw(layout, *heads)
    plan = CsaPlan(layout, num_ranks, *heads, HEAD_DIM, 4)

    o, posted = run_csa(plan, layer, inputs)

    torch.testing.assert_close(o.double(), oracle(layout, layer, inputs), atol=3e-6, rtol=1e-5)
    assert posted == plan.bytes_per_layer(layer)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 130])
def test_exact_slices_at_any_degree(num_ranks: int, num_tokens: int) -> None:
    layout = exact_layout(num_tokens, num_ranks)
    inputs = draw(layout, 14, 2)
    plan = CsaPlan(layout, num_ranks, 14, 2, HEAD_DIM, 4)
    o, posted = run_csa(plan, 0, inputs)
    dense, _ = reference.segment_attention(*inputs, 0, SCALE)
    torch.testing.assert_close(o.double(), dense, atol=3e-6, rtol=1e-5)
    assert posted == plan.bytes_per_layer()


@pytest.mark.parametrize("name", ["exact", "paper", "two levels, tail, sinks"])
def test_earlier_outputs_ignore_later_tokens(name: str) -> None:
    """Causality across ranks: changing token 99 leaves the outputs before it bit-equal."""
    layout = PROFILES[name].resolve(150)
    inputs = draw(layout, 4, 2)
    plan = CsaPlan(layout, 4, 4, 2, HEAD_DIM, 4)
    before, _ = run_csa(plan, 1, inputs)
    for x in inputs:
        x[99] += 1.0
    after, _ = run_csa(plan, 1, inputs)
    assert torch.equal(before[:99], after[:99])
    assert not torch.equal(before[99:], after[99:])


def test_inputs_are_not_mutated() -> None:
    layout = PROFILES["two levels, tail, sinks"].resolve(150)
    inputs = draw(layout, 4, 2)
    copies = [x.clone() for x in inputs]
    run_csa(CsaPlan(layout, 2, 4, 2, HEAD_DIM, 4), 0, inputs)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


def test_constant_values_and_extreme_scores_stay_exact() -> None:
    """V = 1 gives 1, whatever the scores: nothing is counted twice and nothing overflows."""
    layout = PROFILES["two levels, tail, sinks"].resolve(150)
    q, k, v = draw(layout, 4, 2)
    inputs = (q * 1e4, k, torch.ones_like(v))
    o, _ = run_csa(CsaPlan(layout, 4, 4, 2, HEAD_DIM, 4), 2, inputs)
    torch.testing.assert_close(o, torch.ones_like(o), atol=1e-5, rtol=0)
