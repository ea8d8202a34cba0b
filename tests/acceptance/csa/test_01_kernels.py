"""Must show 1, tests 14 and 15 of `attention.md`: the kernels' own suite, run as it stands and counted."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.must_show import MustShow

pytestmark = pytest.mark.acceptance

TIMEOUT_S = 1_800
PAST_2_31 = "two_to_the_31"


def passed(repo_root: Path, selection: str) -> int:
    """How many kernel tests passed; none may fail or be skipped for want of triton."""
    command = [sys.executable, "-m", "pytest", "-q", "-rN", "tests/unit/kernels", "-k", selection]
    run = subprocess.run(
        command, cwd=repo_root, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert run.returncode == 0, run.stdout[-2_000:]
    counts = {kind: int(count) for count, kind in re.findall(r"(\d+) (passed|skipped)", run.stdout)}
    assert "skipped" not in counts, run.stdout[-500:]
    return counts["passed"]


def test_three_forms_agree(must_show: MustShow, repo_root: Path) -> None:
    with must_show("1.14 interpreter = CPU form = fp64 reference, five kernels") as figures:
        figures.append(f"{passed(repo_root, f'not {PAST_2_31}')} tests of tests/unit/kernels")


def test_an_index_past_2_31(must_show: MustShow, repo_root: Path) -> None:
    with must_show("1.15 an index past 2^31") as figures:
        figures.append(f"{passed(repo_root, PAST_2_31)} kernels read or write there")
