"""Warm-up calls every family, with keys of every kind; triton stays out of a CPU process."""

import subprocess
import sys

import pytest
import torch

from sps2_kernels.shape import KernelShape
from sps2_kernels.warm_up import warm_up


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


def test_heads_must_divide() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        KernelShape(5, 2, 64, torch.float32)
