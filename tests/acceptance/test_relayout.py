"""Relayout of KV at full size: 10,000 pairs of meshes, tensor degrees and GQA ratios."""

import pytest

from support.must_show import MustShow
from support.relayout_cases import MAX_RATIO, NUM_CASES, check_many

pytestmark = pytest.mark.acceptance


def test_any_mesh_to_any_mesh(must_show: MustShow) -> None:
    with must_show("relayout, R and D in 1..8, any tensor degrees") as figures:
        ratios = check_many(NUM_CASES)
        figures.append(f"{len(ratios)} cases, every head of every token once")
        figures.append(f"bytes at most {max(ratios):.4f} x the minimum")
        assert max(ratios) <= MAX_RATIO
