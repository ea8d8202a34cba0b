"""Must show 2: bytes and FLOPs are counted exactly, over a grid; and what CSA saves."""

from collections.abc import Iterator
from itertools import product

import pytest

from sps2_engine.attention.csa_plan import CsaPlan
from sps2_engine.attention.plan import AttentionPlan
from sps2_layout.layout import exact_layout
from sps2_layout.profiles import Profile, paper_profile
from support.csa_cases import (
    ELEMENT_BYTES,
    HEAD_DIM,
    PLANS,
    PROFILES,
    closed_forms,
    draw,
    mask_pairs,
    run_plan,
)
from support.must_show import MustShow

pytestmark = pytest.mark.acceptance

TOKENS = (1, 7, 64, 333, 1_000, 2_048)
HEADS = ((8, 2), (6, 6), (14, 2), (5, 1))
RANKS = (1, 2, 4, 8)
TABLE_TOKENS = tuple(8_192 << n for n in range(8))
TABLE_SHARDS = 8


def grid(schedule: str) -> Iterator[AttentionPlan]:
    """Ragged and regular prompts, all profiles, head ratios and degrees, whole and in small chunks."""
    cases = product(PROFILES.values(), TOKENS, HEADS, RANKS)
    for index, (profile, num_tokens, heads, num_ranks) in enumerate(cases):
        chunk_bytes = (256, 1 << 20)[index % 2]
        yield PLANS[schedule](
            profile.resolve(num_tokens), num_ranks, *heads, HEAD_DIM, ELEMENT_BYTES, chunk_bytes
        )


@pytest.mark.parametrize("schedule", PLANS)
def test_flops(must_show: MustShow, schedule: str) -> None:
    with must_show(f"2 FLOPs of {schedule} = 4 D x the mask's pairs") as figures:
        num_plans, masks = 0, dict[tuple[object, ...], int]()
        for plan in grid(schedule):
            key = plan.layout, plan.num_q_heads, plan.num_kv_heads
            if key not in masks:
                masks[key] = mask_pairs(*key, layer=3)
            assert plan.flops_per_layer(3) == 4 * HEAD_DIM * masks[key], plan
            num_plans += 1
        figures.append(f"{num_plans} plans, {len(masks)} masks")


@pytest.mark.parametrize("schedule", PLANS)
def test_bytes(must_show: MustShow, schedule: str) -> None:
    with must_show(f"2 bytes of {schedule} posted = counted") as figures:
        total, num_plans = 0, 0
        for plan in list(grid(schedule))[::5]:
            layout = plan.layout
            inputs = draw(layout.num_tokens, plan.num_q_heads, plan.num_kv_heads)
            posted = run_plan(plan, 3, inputs).posted
            assert posted == [plan.sent_bytes(rank, 3) for rank in range(plan.num_ranks)], plan
            total, num_plans = total + sum(posted), num_plans + 1
        figures.append(f"{num_plans} runs, {total:,} bytes, each rank's alike")


def test_closed_forms(must_show: MustShow) -> None:
    with must_show("2 counts = the closed forms where they hold") as figures:
        num_plans = 0
        level_sets: tuple[tuple[tuple[int, int], ...], ...] = (
            ((1, 1), (8, 8)),
            ((1, 1), (2, 2), (8, 4)),
            ((1, 1), (8, 1)),
            ((1, 1), (4, 2)),
        )
        for levels, dense, heads, num_ranks in product(
            level_sets, (False, True), ((8, 2), (16, 8), (8, 8)), RANKS
        ):
            layout = Profile(8, levels, dense).resolve(8 * 8 * 24)
            plan = CsaPlan(layout, num_ranks, *heads, 64, 2)
            flops, moved = closed_forms(plan)
            assert plan.flops_per_layer() == pytest.approx(flops * num_ranks, rel=1e-12)
            assert plan.bytes_per_layer() == pytest.approx(moved * num_ranks, rel=1e-12)
            num_plans += 1
        figures.append(f"{num_plans} plans")


def test_table_of_savings(must_show: MustShow) -> None:
    """A layer of 32/8 heads of 128, bf16, on 8 ranks: what exact attention costs and CSA saves."""
    with must_show("2 saved against exact, per rank and layer") as figures:
        profiles = {
            "paper": paper_profile(TABLE_SHARDS),
            "tail 64": Profile(TABLE_SHARDS, ((1, 1), (TABLE_SHARDS, 8)), tail=64, sinks=4),
            "dense queries": Profile(TABLE_SHARDS, ((1, 1), (TABLE_SHARDS, 8)), dense_queries=True),
            "two levels": Profile(TABLE_SHARDS, ((1, 1), (2, 2), (TABLE_SHARDS, 8)), tail=64),
        }
        for num_tokens in TABLE_TOKENS:
            exact = CsaPlan(exact_layout(num_tokens, TABLE_SHARDS), TABLE_SHARDS, 32, 8, 128, 2)
            flops, moved = exact.flops_per_layer() / TABLE_SHARDS, exact.bytes_per_layer() / TABLE_SHARDS
            line = f"\n{num_tokens:>9,} tokens: exact {flops / 1e12:8.2f} TFLOP {moved / 1e6:7.1f} MB"
            for name, profile in profiles.items():
                plan = CsaPlan(profile.resolve(num_tokens), TABLE_SHARDS, 32, 8, 128, 2)
                fewer_flops = exact.flops_per_layer() / plan.flops_per_layer()
                fewer_bytes = exact.bytes_per_layer() / plan.bytes_per_layer()
                line += f" | {name} {fewer_flops:.1f}x {fewer_bytes:.1f}x"
                assert fewer_flops > 1
                assert fewer_bytes > 1
            figures.append(line)
