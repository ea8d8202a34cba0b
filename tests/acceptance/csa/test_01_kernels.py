"""Must show 1, tests 14 and 15 of `attention.md`: the kernels' own suite, run as it stands and counted."""

from pathlib import Path

import pytest

from support.kernel_suite import PAST_2_31, passed
from support.must_show import MustShow

pytestmark = pytest.mark.acceptance


def test_three_forms_agree(must_show: MustShow, repo_root: Path) -> None:
    with must_show("1.14 interpreter = CPU form = fp64 reference, five kernels") as figures:
        figures.append(f"{passed(repo_root, f'not {PAST_2_31}')} tests of tests/unit/kernels")


def test_an_index_past_2_31(must_show: MustShow, repo_root: Path) -> None:
    with must_show("1.15 an index past 2^31") as figures:
        figures.append(f"{passed(repo_root, PAST_2_31)} kernels read or write there")
