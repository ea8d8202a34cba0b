"""Must show 2: bytes and FLOPs are counted exactly, over a grid; and what CSA saves."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from sps2_engine.attention.csa_plan import CsaPlan
from sps2_engine.attention.plan import AttentionPlan
from sps2_layout.layout import Layout, exact_layout
from sps2_layout.profiles import Profile, default_profile, paper_profile
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


def test_table_of_savings(must_show: MustShow, repo_root: Path) -> None:
    """A layer of 32/8 heads of 128, bf16, on 8 ranks: what exact attention costs and CSA saves."""
    with must_show("2 saved against exact, per rank and layer") as figures:
        far = ((1, 1), (TABLE_SHARDS, 8))
        profiles = {
            "`paper`": paper_profile(TABLE_SHARDS),
            "`default`": default_profile(TABLE_SHARDS),
            "stride 4": Profile(TABLE_SHARDS, ((1, 1), (TABLE_SHARDS, 4)), tail=64),
            "stride 8, dense queries": Profile(TABLE_SHARDS, far, dense_queries=True),
            "strides 2 and 8": Profile(TABLE_SHARDS, ((1, 1), (2, 2), (TABLE_SHARDS, 8)), tail=64),
        }
        table = [f"| tokens | exact | {' | '.join(profiles)} |", f"|{'---|' * (len(profiles) + 2)}"]
        for num_tokens in TABLE_TOKENS:
            exact = cost(exact_layout(num_tokens, TABLE_SHARDS))
            cells = [f"{num_tokens:,}", f"{exact[0] / 1e12:.2f} TFLOP, {exact[1] / 1e6:.0f} MB"]
            for profile in profiles.values():
                flops, moved = cost(profile.resolve(num_tokens))
                cells.append(f"{exact[0] / flops:.1f}x, {exact[1] / moved:.1f}x")
                assert flops < exact[0]
                assert moved < exact[1]
            table.append(f"| {' | '.join(cells)} |")
        path = repo_root / ".out" / "csa" / "savings.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(table) + "\n", encoding="utf-8")
        figures += ["fewer FLOPs, fewer bytes", str(path), "\n" + "\n".join(table)]


def cost(layout: Layout) -> tuple[float, float]:
    """FLOPs and bytes of a layer, mean per rank."""
    plan = CsaPlan(layout, TABLE_SHARDS, 32, 8, 128, 2)
    return plan.flops_per_layer() / TABLE_SHARDS, plan.bytes_per_layer() / TABLE_SHARDS
