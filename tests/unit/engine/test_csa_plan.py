"""The pure CSA plan against the mask: every visible pair is computed once, by somebody, at every degree."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sps2_engine.attention.csa_plan import CsaPlan, head_runs, split_heads
from sps2_kernels import reference
from sps2_layout.layout import Layout, Level, Sample, Span, exact_layout
from sps2_layout.profiles import Profile, paper_profile


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Layouts of every shape that fits a short prompt."""
    num_shards = draw(st.sampled_from([1, 2, 4, 8]))
    levels = [(1, 1)]
    group, stride = 1, 1
    while group < num_shards and draw(st.booleans()):
        group *= draw(st.sampled_from([g for g in (2, 4, 8) if group * g <= num_shards]))
        stride *= draw(st.sampled_from([1, 2, 4]))
        levels.append((group, stride))
    profile = Profile(
        num_shards,
        tuple(levels),
        dense_queries=draw(st.booleans()),
        sinks=draw(st.sampled_from([0, 1, 5, 40])),
        tail=draw(st.sampled_from([0, 1, 7, 50])),
    )
    return profile.resolve(draw(st.integers(1, 130)))


def mask_pairs(layout: Layout, num_q_heads: int, num_kv_heads: int, layer: int) -> int:
    levels = [(level.group, level.stride) for level in layout.levels]
    return sum(
        int(
            reference.csa_mask(
                layout.num_tokens,
                layout.shard_tokens,
                levels,
                kv_head,
                layer,
                dense_queries=layout.dense_queries,
                sinks=layout.sinks,
                tail=layout.tail,
            ).sum()
        )
        * (num_q_heads // num_kv_heads)
        for kv_head in range(num_kv_heads)
    )


@settings(max_examples=60, deadline=None)
@given(layouts(), st.integers(0, 5), st.sampled_from([(4, 2), (3, 1), (7, 1)]), st.data())
def test_flops_are_those_of_the_mask_at_every_degree(
    layout: Layout, layer: int, heads: tuple[int, int], data: st.DataObject
) -> None:
    num_ranks = data.draw(st.sampled_from([p for p in (1, 2, 4, 8) if layout.num_shards % p == 0]))
    plan = CsaPlan(layout, num_ranks, *heads, head_dim=16, element_bytes=4)
    assert plan.flops_per_layer(layer) == 4 * 16 * mask_pairs(layout, *heads, layer)


def closed_forms(plan: CsaPlan) -> tuple[float, float]:
    """FLOPs and bytes per layer, mean per rank (`attention.md`)."""
    layout, p = plan.layout, plan.num_ranks
    n, a, hq, d = layout.num_shards, layout.shard_tokens, plan.num_q_heads, plan.head_dim
    b, s = plan.element_bytes, layout.num_tokens
    flops, moved = float(a * (a + 1)), 0.0
    for lower, level in zip(layout.levels, layout.levels[1:], strict=False):
        q = 1.0 if layout.dense_queries else 1 / level.stride
        flops += a * a * level.group * (1 - lower.group / level.group) * q / level.stride
        big, small = max(1, level.group * p // n), max(1, lower.group * p // n)
        per_token = q * hq * (2 * b * d + 4) + 2 * b * d * max(plan.num_kv_heads, big) / level.stride
        moved += (1 - 1 / big) * (1 - small / big) * (s / p) * per_token
    return n / p * 2 * d * hq * flops, moved


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("heads", [(8, 2), (16, 8), (8, 8)])
@pytest.mark.parametrize("levels", [((1, 1), (8, 8)), ((1, 1), (2, 2), (8, 4)), ((1, 1), (8, 1))])
@pytest.mark.parametrize("dense_queries", [False, True])
def test_flops_and_bytes_are_the_closed_forms(
    num_ranks: int, heads: tuple[int, int], levels: tuple[tuple[int, int], ...], dense_queries: bool
) -> None:
    layout = Profile(8, levels, dense_queries).resolve(8 * 8 * 24)
    plan = CsaPlan(layout, num_ranks, *heads, head_dim=64, element_bytes=2)
    flops, moved = closed_forms(plan)
    for layer in (0, 3):
        assert plan.flops_per_layer(layer) == pytest.approx(flops * num_ranks, rel=1e-12)
        assert plan.bytes_per_layer(layer) == pytest.approx(moved * num_ranks, rel=1e-12)


def test_the_figures_of_the_design() -> None:
    """S = 128k, 32/8 heads, D = 128, bf16, on 8 ranks, per rank and layer: 2.44 TFLOP and 32 MB, exact 17.6 and 259."""
    for profile, tflop, megabytes in (
        (paper_profile(8), 2.44, 32),
        (Profile(8, ((1, 1), (8, 1))), 17.6, 259),
    ):
        plan = CsaPlan(profile.resolve(131_072), 8, 32, 8, 128, 2)
        assert plan.flops_per_layer() / 8 / 1e12 == pytest.approx(tflop, rel=0.01)
        assert plan.bytes_per_layer() / 8 / 1e6 == pytest.approx(megabytes, rel=0.02)


@given(st.integers(1, 5000), st.integers(1, 9))
def test_exact_slices_are_even(num_tokens: int, num_ranks: int) -> None:
    layout = exact_layout(num_tokens, num_ranks)
    plan = CsaPlan(layout, num_ranks, 4, 2, 16, 4)
    assert layout.is_exact
    assert sum(len(plan.tokens(rank)) for rank in range(num_ranks)) == num_tokens
    assert len(plan.tokens(0)) == -(-num_tokens // num_ranks)


@given(st.sampled_from([(8, 2), (14, 2), (28, 4), (32, 8), (6, 6), (5, 1)]), st.integers(1, 9), st.booleans())
def test_head_runs_cover_each_share_once(heads: tuple[int, int], num_ranks: int, single: bool) -> None:
    fold = heads[0] // heads[1]
    for share in split_heads(heads[0], num_ranks):
        runs = head_runs(share, fold, single=single)
        covered = [head for run in runs for head in range(run.q_heads.begin, run.q_heads.end)]
        assert covered == list(range(share.begin, share.end))
        for run in runs:
            assert {head // fold for head in range(run.q_heads.begin, run.q_heads.end)} == set(
                range(run.kv_heads.begin, run.kv_heads.end)
            )
            assert len(run.q_heads) % len(run.kv_heads) == 0
            assert not single or len(run.kv_heads) == 1


def test_uneven_shares_of_fourteen_heads() -> None:
    assert [len(share) for share in split_heads(14, 4)] == [3, 4, 3, 4]


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 9), st.integers(0, 8))
def test_samples_are_the_tokens_they_name(begin: int, length: int, stride: int, offset: int) -> None:
    sample = Sample(Span(begin, begin + length), stride, offset % stride)
    wanted = [token for token in range(begin, begin + length) if token % stride == offset % stride]
    assert len(sample) == len(wanted)
    if wanted:
        assert sample.first == wanted[0]


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Layout(8, (Level(1, 2),), 1, 8),
        lambda: Layout(8, (Level(1, 1), Level(3, 2), Level(4, 4)), 4, 4),
        lambda: Layout(8, (Level(1, 1), Level(4, 4)), 4, 2),
        lambda: Layout(80, (Level(1, 1), Level(4, 4)), 4, 4),
        lambda: CsaPlan(paper_profile(8).resolve(100), 3, 4, 2, 16, 4),
    ],
)
def test_what_does_not_divide_is_refused(bad: object) -> None:
    assert callable(bad)
    with pytest.raises(ValueError, match=r"."):
        bad()
