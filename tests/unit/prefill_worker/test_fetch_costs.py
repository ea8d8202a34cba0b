"""Whether a cached beginning is fetched or computed: bytes at the configured rate against FLOPs at documented ones."""

import pytest

from sps2.internal.v1 import engine_pb2
from sps2_layout.attention import Attention
from sps2_layout.layout import Span
from sps2_layout.profiles import Ladder, Profile
from sps2_prefill_worker.fetch_costs import LEAST_TIMEOUT_S, FetchCosts
from sps2_prefill_worker.planning import PromptPlanner

SPARSE = Ladder("sparse", (Profile(8, ((1, 1), (8, 8)), tail=16),), 1)
NUM_TOKENS = 32_768
EXACT = Attention(NUM_TOKENS, NUM_TOKENS)
ALL = Span(0, NUM_TOKENS)


def planner(num_ranks: int, tp: int = 1) -> PromptPlanner:
    """Of an 8B model in bf16 on GPUs: 131,072 bytes of KV and 14 GFLOP of products for a token."""
    loaded = engine_pb2.EngineLoaded(
        device="cuda",
        dtype="bf16",
        num_layers=32,
        num_q_heads=32,
        num_kv_heads=8,
        head_dim=128,
        kv_blocks_total=10_000,
        linear_flops_per_token=14_000_000_000 // tp,
    )
    return PromptPlanner.of([loaded] * num_ranks, "auto", 1, tp)


def test_a_token_has_so_many_bytes() -> None:
    assert planner(1).costs.kv_token_bytes == 2 * 32 * 8 * 128 * 2
    on_cpu = engine_pb2.EngineLoaded(device="cpu", dtype="bf16", num_layers=2, num_kv_heads=1, head_dim=4)
    assert PromptPlanner.of([on_cpu], "auto", 1).costs.kv_token_bytes == 2 * 2 * 4 * 4, "kept in fp32"


@pytest.mark.parametrize(
    ("gbps", "num_ranks", "worth"),
    [(100.0, 1, True), (100.0, 8, True), (3.0, 1, True), (3.0, 8, False), (0.5, 1, False)],
)
def test_it_pays_where_the_link_is_faster_than_the_ranks(gbps: float, num_ranks: int, worth: bool) -> None:
    """4.3 GB against 1.7 s of one GPU: exact attention of 32k tokens costs as much again as the products."""
    assert planner(1).compute_s(EXACT, ALL) == pytest.approx(1.07 + 0.65, rel=0.05)
    assert FetchCosts("auto", gbps * 1e9).worth(planner(num_ranks), EXACT, ALL) is worth


def test_tensor_ranks_count_as_sequence_ranks_do() -> None:
    assert planner(4, tp=4).compute_s(EXACT, ALL) == pytest.approx(planner(4).compute_s(EXACT, ALL), rel=0.01)


def test_a_few_tokens_are_not_worth_the_calls() -> None:
    assert not FetchCosts("auto", 100e9).worth(planner(1), EXACT, Span(0, 64))
    assert FetchCosts("auto", 100e9).worth(planner(1), EXACT, Span(NUM_TOKENS - 1024, NUM_TOKENS))


def test_under_a_sparse_mask_compute_is_counted_as_its_products() -> None:
    sparse = Attention.admit(SPARSE, NUM_TOKENS)
    assert planner(1).compute_s(sparse, ALL) == pytest.approx(1.07, rel=0.05)


def test_always_and_never_ask_for_no_costs() -> None:
    assert FetchCosts("always", 1.0).worth(planner(8), EXACT, ALL)
    assert not FetchCosts("never", 1e15).worth(planner(1), EXACT, ALL)


@pytest.mark.parametrize(
    ("costs", "num_ranks", "expected"),
    [
        (FetchCosts("auto", 131_072 * 1e6), 1, 1e-6 / (14e9 / 430e12)),
        (FetchCosts("auto", 131_072 * 1e6), 4, 4e-6 / (14e9 / 430e12)),
        (FetchCosts("always", 1.0), 1, 1.0),
        (FetchCosts("never"), 1, 0.0),
    ],
)
def test_routers_are_told_what_a_fetched_token_costs(
    costs: FetchCosts, num_ranks: int, expected: float
) -> None:
    assert costs.token_cost(planner(num_ranks)) == pytest.approx(expected)


def test_a_fetch_has_a_deadline_by_its_size() -> None:
    costs = FetchCosts("auto", 4.3e9)
    assert costs.timeout_s(planner(1), ALL) == pytest.approx(LEAST_TIMEOUT_S + 4, rel=0.05)
    assert costs.timeout_s(planner(1), Span(0, 64)) == pytest.approx(LEAST_TIMEOUT_S, abs=0.1)
