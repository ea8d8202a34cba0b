"""Exact prefill attention over 1 to 5 ranks equals dense causal attention, and posts exactly what the plan counts."""

import pytest
import torch
from sps2_engine.attention.heads_schedule import HeadsSchedule
from sps2_engine.attention.prefill_plan import PrefillPlan
from sps2_engine.collectives import Communicator
from sps2_kernels import reference
from support.ranks import run_ranks

HEAD_DIM = 16
SCALE = HEAD_DIM**-0.5


def run_exact(
    plan: PrefillPlan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, list[int]]:
    """Attention of the whole prompt, computed by all ranks, and the bytes that each posted."""

    def on_rank(communicator: Communicator) -> tuple[torch.Tensor, int]:
        span = plan.slices[communicator.rank]
        own = slice(span.begin, span.end)
        o = HeadsSchedule(plan, communicator, SCALE).attend(q[own], k[own], v[own])
        return o, communicator.bytes_posted["all_to_all"]

    results = run_ranks(plan.num_ranks, on_rank)
    return torch.cat([o for o, _ in results]), [posted for _, posted in results]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), [(8, 2), (14, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 17, 130])
def test_equals_dense_causal_attention(num_ranks: int, num_q_heads: int, num_kv_heads: int, num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    q = torch.randn(num_tokens, num_q_heads, HEAD_DIM, generator=generator)
    k = torch.randn(num_tokens, num_kv_heads, HEAD_DIM, generator=generator)
    v = torch.randn(num_tokens, num_kv_heads, HEAD_DIM, generator=generator)
    plan = PrefillPlan(num_tokens, num_ranks, num_q_heads, num_kv_heads, HEAD_DIM, 4)

    o, posted = run_exact(plan, q, k, v)

    expected, _ = reference.segment_attention(q, k, v, 0, SCALE)
    torch.testing.assert_close(o.double(), expected, atol=2e-6, rtol=1e-5)
    assert sum(posted) == plan.bytes_per_layer()


def test_own_inputs_are_not_mutated() -> None:
    q, k, v = (torch.randn(40, heads, HEAD_DIM) for heads in (4, 2, 2))
    before = [x.clone() for x in (q, k, v)]
    run_exact(PrefillPlan(40, 2, 4, 2, HEAD_DIM, 4), q, k, v)
    for x, copy in zip((q, k, v), before, strict=True):
        assert torch.equal(x, copy)


def test_earlier_outputs_ignore_later_tokens() -> None:
    """Causality across ranks: changing token 29 leaves the outputs before it bit-equal."""
    q, k, v = (torch.randn(40, heads, HEAD_DIM) for heads in (4, 2, 2))
    plan = PrefillPlan(40, 4, 4, 2, HEAD_DIM, 4)
    before, _ = run_exact(plan, q, k, v)
    for x in (q, k, v):
        x[29] += 1.0
    after, _ = run_exact(plan, q, k, v)
    assert torch.equal(before[:29], after[:29])
    assert not torch.equal(before[29:], after[29:])
