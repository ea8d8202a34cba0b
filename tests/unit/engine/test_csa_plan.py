"""The pure CSA plan against the mask: every visible pair is computed once, by somebody, at every degree."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sps2_engine.attention.across import MAX_CHUNKS
from sps2_engine.attention.csa_plan import CsaPlan, chunk_pieces, row_block, split_heads
from sps2_engine.attention.hosting import CHUNK_BYTES
from sps2_engine.attention.kv_schedule import KvPlan
from sps2_engine.attention.pieces import Stage, head_runs
from sps2_kernels import reference
from sps2_layout.layout import Layout, Level, Sample, Span, exact_layout
from sps2_layout.profiles import Profile, paper_profile
from support.csa_cases import PLANS, PROFILES, closed_forms, mask, mask_pairs


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
    layout = profile.resolve(draw(st.integers(1, 130)))
    return layout.extended(layout.num_tokens + draw(st.sampled_from([0, 0, 1, 30, 90])))


@settings(max_examples=100, deadline=None)
@given(layouts(), st.integers(0, 70), st.integers(0, 3), st.integers(0, 3))
def test_an_extended_layout_keeps_the_mask(layout: Layout, more: int, kv_head: int, layer: int) -> None:
    """Every query of the prompt sees what it saw, and every one behind it all before it."""
    num_tokens = layout.num_tokens
    extended = layout.extended(num_tokens + more)
    seen = mask(extended, kv_head, layer)
    assert torch.equal(seen[:num_tokens, :num_tokens], mask(layout, kv_head, layer))
    assert not seen[:num_tokens, num_tokens:].any()
    assert torch.equal(seen[num_tokens:], torch.ones_like(seen).tril()[num_tokens:])
    assert sum(len(extended.shard(n)) for n in range(extended.num_shards)) == num_tokens + more
    with pytest.raises(ValueError, match="cannot be cut"):
        extended.extended(extended.num_tokens - 1)


@settings(max_examples=100, deadline=None)
@given(layouts(), st.floats(0, 1), st.integers(0, 70), st.integers(0, 3), st.integers(0, 3))
def test_an_adopted_layout_keeps_the_mask_of_what_is_cached(
    layout: Layout, share: float, num_rest: int, kv_head: int, layer: int
) -> None:
    """The first C tokens see what they saw in the prompt that they come from; all behind them see everything."""
    num_prefilled = max(1, round(share * layout.num_tokens))
    adopted = layout.extended(num_prefilled + num_rest, num_prefilled)
    seen, was = mask(adopted, kv_head, layer), mask(layout, kv_head, layer)
    assert torch.equal(seen[:num_prefilled, :num_prefilled], was[:num_prefilled, :num_prefilled])
    assert torch.equal(seen[num_prefilled:], torch.ones_like(seen).tril()[num_prefilled:])
    dense = layout.dense_from(num_prefilled)
    assert torch.equal(seen[dense:], torch.ones_like(seen).tril()[dense:])


@settings(max_examples=60, deadline=None)
@given(
    layouts(),
    st.integers(0, 5),
    st.sampled_from([(4, 2), (3, 1), (7, 1)]),
    st.sampled_from(sorted(PLANS)),
    st.sampled_from([1, 1 << 30]),
    st.data(),
)
def test_flops_are_those_of_the_mask_at_every_degree(
    layout: Layout,
    layer: int,
    heads: tuple[int, int],
    schedule: str,
    chunk_bytes: int,
    data: st.DataObject,
) -> None:
    num_ranks = data.draw(st.sampled_from([p for p in (1, 2, 4, 8) if layout.num_shards % p == 0]))
    plan = PLANS[schedule](layout, num_ranks, *heads, 16, 4, chunk_bytes)
    assert plan.flops_per_layer(layer) == 4 * 16 * mask_pairs(layout, *heads, layer)


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("heads", [(8, 2), (16, 8), (8, 8)])
@pytest.mark.parametrize("levels", [((1, 1), (8, 8)), ((1, 1), (2, 2), (8, 4)), ((1, 1), (8, 1))])
@pytest.mark.parametrize("dense_queries", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, CHUNK_BYTES])
def test_flops_and_bytes_are_the_closed_forms(
    num_ranks: int,
    heads: tuple[int, int],
    levels: tuple[tuple[int, int], ...],
    dense_queries: bool,
    chunk_bytes: int,
) -> None:
    layout = Profile(8, levels, dense_queries).resolve(8 * 8 * 24)
    plan = CsaPlan(layout, num_ranks, *heads, 64, 2, chunk_bytes)
    flops, moved = closed_forms(plan)
    for layer in (0, 3):
        assert plan.flops_per_layer(layer) == pytest.approx(flops * num_ranks, rel=1e-12)
        assert plan.bytes_per_layer(layer) == pytest.approx(moved * num_ranks, rel=1e-12)


def test_the_figures_of_the_design() -> None:
    """128k tokens, 8 shards and ranks, 32/8 heads, D = 128, bf16: TFLOP and MB per rank and layer."""
    for profile, tflop, megabytes in (
        (paper_profile(8), 2.44, 32),
        (Profile(8, ((1, 1), (8, 1))), 17.6, 259),
    ):
        plan = CsaPlan(profile.resolve(131_072), 8, 32, 8, 128, 2)
        assert plan.flops_per_layer() / 8 / 1e12 == pytest.approx(tflop, rel=0.01)
        assert plan.bytes_per_layer() / 8 / 1e6 == pytest.approx(megabytes, rel=0.02)


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("num_tokens", [1, 7, 61, 130])
def test_the_mask_of_ranges_is_the_mask_of_pairs(name: str, num_tokens: int) -> None:
    layout = PROFILES[name].resolve(num_tokens)
    levels = [(level.group, level.stride) for level in layout.levels]
    for kv_head in range(3):
        pairs = reference.csa_mask(
            num_tokens,
            layout.shard_tokens,
            levels,
            kv_head,
            1,
            dense_queries=layout.dense_queries,
            sinks=layout.sinks,
            tail=layout.tail,
        )
        assert torch.equal(mask(layout, kv_head, 1), pairs)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_folded_shards_are_even(num_ranks: int) -> None:
    """With N = 2P every rank computes as many pairs; with consecutive shards the last has most."""
    layout = exact_layout(16 * 64, 2 * num_ranks)
    folded = KvPlan(layout, num_ranks, 4, 2, 16, 4)
    assert len({folded.pairs(rank, 0) for rank in range(num_ranks)}) == 1
    assert folded.last_rank == 0
    assert folded.spans(0)[-1].end == layout.num_tokens
    consecutive = KvPlan(layout, num_ranks, 4, 2, 16, 4, folds_shards=False)
    loads = [consecutive.pairs(rank, 0) for rank in range(num_ranks)]
    assert loads == sorted(loads)
    assert sum(loads) == sum(folded.pairs(rank, 0) for rank in range(num_ranks))


@pytest.mark.parametrize(
    ("num_tokens", "num_chunks"), [(100, 1), (2_000, 1), (4_000, 2), (50_000, MAX_CHUNKS)]
)
def test_small_exchanges_are_not_cut(num_tokens: int, num_chunks: int) -> None:
    plan = CsaPlan(Profile(2, ((1, 1), (2, 1))).resolve(num_tokens), 2, 8, 2, 64, 4)
    assert [stage.num_chunks for stage in plan.stages()] == [num_chunks] * num_chunks


@given(st.integers(0, 20), st.integers(1, 14), st.integers(1, 7), st.integers(1, 5))
def test_chunks_cover_a_share_once(begin: int, length: int, fold: int, num_chunks: int) -> None:
    """Each (head, row) of a share is in one chunk, and a KV head's first rows come first."""
    share, rows = Span(begin, begin + length), Sample(Span(3, 40), 2, 1)
    seen: list[tuple[int, int]] = []
    for chunk in range(num_chunks):
        for piece in chunk_pieces(share, fold, Stage(1, chunk, num_chunks)):
            block = row_block(rows, piece.row_block, piece.num_row_blocks)
            tokens = range(block.first, block.span.end, block.stride)
            new = [(head, t) for head in range(piece.q_heads.begin, piece.q_heads.end) for t in tokens]
            assert all(piece.row_block == 0 or (head, rows.first) in seen for head, _ in new)
            seen += new
    wanted = range(rows.first, rows.span.end, rows.stride)
    assert sorted(seen) == [(head, t) for head in range(begin, begin + length) for t in wanted]


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
