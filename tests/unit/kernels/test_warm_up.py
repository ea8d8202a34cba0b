"""Warm-up calls every family, with keys of every kind; triton stays out of a CPU process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sps2_kernels.shape import KernelShape
from sps2_kernels.warm_up import warm_up
from support.triton_interpreter import NO_TRITON
from support.triton_plugin import has_triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_on_a_cpu(dtype: torch.dtype) -> None:
    warm_up(KernelShape(4, 2, 64, dtype), torch.device("cpu"))


def test_a_cpu_user_never_imports_triton() -> None:
    program = """
import sys, torch
from sps2_kernels.shape import KernelShape
from sps2_kernels.warm_up import warm_up
warm_up(KernelShape(4, 2, 64, torch.float32), torch.device("cpu"))
print("triton" in sys.modules)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=True
    )
    assert run.stdout.strip() == "False"


@pytest.mark.parametrize("shape", ["32 8 128 bfloat16", "14 2 64 float32", "8 1 96 bfloat16"])
def test_launches_exactly_the_listed_keys(shape: str) -> None:
    """So nothing is compiled while serving, and what `compile_report` lists is what runs."""
    if not has_triton():
        pytest.skip(NO_TRITON)
    command = [sys.executable, "-m", "support.launched_keys", *shape.split()]
    tests = Path(__file__).parents[2]
    run = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False, cwd=tests)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {"only listed": [], "only launched": []}


def test_heads_must_divide() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        KernelShape(5, 2, 64, torch.float32)
