"""The pure prefill plan: slices, head shares and bytes."""

from hypothesis import given
from hypothesis import strategies as st
from sps2_engine.attention.prefill_plan import PrefillPlan, Span, head_runs, kv_heads_of, split_heads, split_tokens


@given(st.integers(1, 10_000), st.integers(1, 16))
def test_slices_cover_the_prompt_once(num_tokens: int, num_ranks: int) -> None:
    slices = split_tokens(num_tokens, num_ranks)
    assert slices[0].begin == 0
    assert slices[-1].end == num_tokens
    assert all(a.end == b.begin for a, b in zip(slices, slices[1:], strict=False))


@given(st.sampled_from([(8, 2), (14, 2), (28, 4), (32, 8), (6, 6), (5, 1)]), st.integers(1, 9))
def test_head_runs_cover_each_share_once(heads: tuple[int, int], num_ranks: int) -> None:
    num_q_heads, num_kv_heads = heads
    group = num_q_heads // num_kv_heads
    for share in split_heads(num_q_heads, num_ranks):
        covered = [h for run in head_runs(share, group) for h in range(run.q_heads.begin, run.q_heads.end)]
        assert covered == list(range(share.begin, share.end))
        for run in head_runs(share, group):
            assert len(run.q_heads) % len(run.kv_heads) == 0
            assert kv_heads_of(run.q_heads, group) == run.kv_heads


def test_ragged_shares_of_fourteen_heads() -> None:
    assert [len(share) for share in split_heads(14, 4)] == [3, 4, 3, 4]
    assert head_runs(Span(4, 9), 7) == (head_runs(Span(4, 7), 7)[0], head_runs(Span(7, 9), 7)[0])


@given(
    st.sampled_from([2, 4, 8]),
    st.integers(1, 500),
    st.sampled_from([(8, 2), (8, 4), (16, 16), (8, 8)]),
    st.sampled_from([2, 4]),
)
def test_bytes_equal_the_closed_form(num_ranks: int, width: int, heads: tuple[int, int], element_bytes: int) -> None:
    """`attention.md`, level with stride 1: (1-1/G)(1-1/M)(S/P)[Hq(2bD+4) + 2bD max(Hkv, G)] per rank, G = M = P."""
    num_q_heads, num_kv_heads = heads
    num_tokens, head_dim = width * num_ranks, 64
    plan = PrefillPlan(num_tokens, num_ranks, num_q_heads, num_kv_heads, head_dim, element_bytes)
    per_token = num_q_heads * (2 * element_bytes * head_dim + 4)
    per_token += 2 * element_bytes * head_dim * max(num_kv_heads, num_ranks)
    assert plan.bytes_per_layer() * num_ranks == (num_ranks - 1) ** 2 * width * per_token


def test_prompts_of_one_slice_exchange_nothing() -> None:
    plan = PrefillPlan(1, 4, 8, 2, 64, 4)
    assert not plan.exchanges
    assert plan.bytes_per_layer() == 0
    assert plan.last_rank == 0
