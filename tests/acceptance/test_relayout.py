"""Relayout of KV at full size: 10,000 pairs of meshes, tensor degrees and GQA ratios."""

import pytest
from hypothesis import HealthCheck, given, settings

from support.must_show import MustShow
from support.relayout_cases import Case, cases, check

pytestmark = pytest.mark.acceptance

NUM_CASES = 10_000
MAX_RATIO = 1.05


def test_any_mesh_to_any_mesh(must_show: MustShow) -> None:
    with must_show("relayout, R and D in 1..8, any tensor degrees") as figures:
        ratios: list[float] = []

        @settings(max_examples=NUM_CASES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(case=cases())
        def every_case(case: Case) -> None:
            ratios.append(check(case))

        every_case()
        figures.append(f"{len(ratios)} cases, every head of every token once")
        figures.append(f"bytes at most {max(ratios):.4f} x the minimum")
        assert len(ratios) >= NUM_CASES
        assert max(ratios) <= MAX_RATIO
