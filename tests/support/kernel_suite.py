"""The kernels' own tests, run as they stand and counted, in a process of their own."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TIMEOUT_S = 1_800
PAST_2_31 = "two_to_the_31"
"""Selects the tests with an index past 2^31."""


def passed(repo_root: Path, selection: str, files: Sequence[str] = ("",)) -> int:
    """How many kernel tests passed; none may fail or be skipped for want of triton.

    Args:
        repo_root: where tests/ lies.
        selection: as for pytest's -k.
        files: of tests/unit/kernels; by default all.
    """
    paths = [f"tests/unit/kernels/{name}" for name in files]
    command = [sys.executable, "-m", "pytest", "-q", "-rN", *paths, "-k", selection]
    run = subprocess.run(
        command, cwd=repo_root, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert run.returncode == 0, run.stdout[-2_000:]
    counts = {kind: int(count) for count, kind in re.findall(r"(\d+) (passed|skipped)", run.stdout)}
    assert "skipped" not in counts, run.stdout[-500:]
    return counts["passed"]
