"""Which exchange schedule is chosen, and why."""

import pytest

from sps2_engine.attention.cost_model import (
    PLANS,
    AttentionShape,
    Exchange,
    choose_schedule,
    estimate,
    make_plan,
    plan_attention,
)
from sps2_engine.attention.csa_plan import CsaPlan
from sps2_engine.attention.kv_schedule import KvPlan
from sps2_engine.attention.rates import Rates, assumed_rates
from sps2_layout.layout import exact_layout
from sps2_layout.profiles import Profile, paper_profile

SHAPE = AttentionShape(num_q_heads=32, num_kv_heads=8, head_dim=128, element_bytes=2)
SLOW_LINK = Rates(flops_per_s=1e15, bytes_per_s=1e9, latency_s=0.0)
FAST_LINK = Rates(flops_per_s=1e12, bytes_per_s=1e15, latency_s=0.0)


@pytest.mark.parametrize("exchange", ["heads", "kv"])
def test_an_estimate_is_of_counted_bytes_and_flops(exchange: Exchange) -> None:
    layout = paper_profile(8).resolve(8_192)
    plan_type = {"heads": CsaPlan, "kv": KvPlan}[exchange]
    plan = plan_type(layout, 2, 32, 8, 128, 2)
    found = estimate(exchange, layout, 2, SHAPE, SLOW_LINK)
    assert found.compute_s == pytest.approx(4 * 128 * max(plan.pairs(rank, 0) for rank in (0, 1)) / 1e15)
    assert found.exchange_s >= plan.bytes_per_layer() / 2 / 1e9
    assert found.step_s == max(found.compute_s, found.exchange_s)


def test_fewer_bytes_win_on_a_slow_link() -> None:
    """Dense queries in a small group: `kv`; sampled queries of many KV heads: `heads`."""
    dense = Profile(16, ((1, 1), (16, 8)), dense_queries=True).resolve(65_536)
    assert choose_schedule(dense, 8, SHAPE, SLOW_LINK) == "kv"
    many_kv_heads = AttentionShape(32, 32, 128, 2)
    sampled = paper_profile(16).resolve(65_536)
    assert choose_schedule(sampled, 8, many_kv_heads, SLOW_LINK) == "heads"


def test_balance_wins_on_a_fast_link() -> None:
    """With one shard to a rank `kv` leaves the last rank most of the work."""
    dense = Profile(8, ((1, 1), (8, 2)), dense_queries=True).resolve(8_192)
    compute_s = {name: estimate(name, dense, 8, SHAPE, FAST_LINK).compute_s for name in PLANS}
    assert compute_s["kv"] > 1.2 * compute_s["heads"]
    assert choose_schedule(dense, 8, SHAPE, FAST_LINK) == "heads"


def test_dense_attention_is_cut_so_that_kv_can_fold() -> None:
    """Every rank then computes as much as by `heads`, where the prompt divides."""
    exact = exact_layout(8_192, 8)
    folded = make_plan("kv", exact, 8, SHAPE)
    assert folded.blocks_per_rank == 2
    assert len({folded.pairs(rank, 0) for rank in range(8)}) == 1
    compute_s = {name: estimate(name, exact, 8, SHAPE, FAST_LINK).compute_s for name in PLANS}
    assert compute_s["kv"] == pytest.approx(compute_s["heads"])


def test_what_is_hardly_sooner_is_not_chosen() -> None:
    """Compute hides both exchanges: `heads`, whatever the last bits of the estimate say."""
    for num_tokens in range(8_000, 8_020):
        assert choose_schedule(exact_layout(num_tokens, 2), 2, SHAPE, FAST_LINK) == "heads"


def test_rates_follow_the_device() -> None:
    one, four = (assumed_rates("cpu", "fp32", threads) for threads in (1, 4))
    assert four.flops_per_s == 4 * one.flops_per_s
    assert assumed_rates("cpu", "bf16", 1).flops_per_s > one.flops_per_s
    assert assumed_rates("cuda", "bf16", 1).bytes_per_s > one.bytes_per_s


@pytest.mark.parametrize("choice", ["heads", "kv"])
def test_an_explicit_choice_is_taken(choice: Exchange) -> None:
    plan = plan_attention(exact_layout(8_192, 8), 8, SHAPE, FAST_LINK, choice)
    assert isinstance(plan, CsaPlan if choice == "heads" else KvPlan)


def test_rates_are_positive() -> None:
    with pytest.raises(ValueError, match="not rates"):
        Rates(flops_per_s=0, bytes_per_s=1)
