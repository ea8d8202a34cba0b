"""The compile listing of the Triton kernels, made in a process of its own: this one may have triton's interpreter."""

import json
import subprocess
import sys
from typing import Any

import pytest

from support.triton_interpreter import NO_TRITON
from support.triton_plugin import has_triton

MAX_SHARED_BYTES = 227 * 1024
"""Shared memory that one block may have on sm_90."""


def compiled_keys(only: str, timeout_s: float) -> list[dict[str, Any]]:
    """`python -m sps2_kernels.compile_report --json` for the keys whose names match a regular expression."""
    if not has_triton():
        pytest.skip(NO_TRITON)
    command = [sys.executable, "-m", "sps2_kernels.compile_report", "--json", "--only", only]
    run = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert run.returncode == 0, run.stderr
    listing: list[dict[str, Any]] = json.loads(run.stdout)
    return listing


def assert_fits(key: dict[str, Any]) -> None:
    """No spills, no serialised wgmma, within shared memory; wgmma where the tensor cores should carry prefill."""
    assert key["spill_bytes"] == 0, key
    assert not key["serialized"], key
    assert key["shared_bytes"] <= MAX_SHARED_BYTES, key
    if key["name"].startswith("segment_attention bf16"):
        assert key["wgmma"] > 0, key
    if key["name"].startswith("paged_decode"):
        assert key["mma"] > 0, key
