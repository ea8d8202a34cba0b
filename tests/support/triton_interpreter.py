"""The Triton forms as they run in triton's interpreter, on CPU tensors, and how near to fp64 they must come."""

import importlib
from functools import cache
from types import ModuleType

import pytest
import torch

from support.triton_plugin import has_triton, interpreting

NO_TRITON = "triton is not installed"


@cache
def _declare_forms() -> None:
    with interpreting():
        importlib.import_module("sps2_kernels.triton_forms.keys")
        merge_states = importlib.import_module("sps2_kernels.triton_forms.merge_states").merge_states
        merge_states(
            torch.zeros(1, 1, 1, 32), torch.zeros(1, 1, 1)
        )  # the first launch imports more of triton


def interpreted_form(family: str) -> ModuleType:
    """The module `sps2_kernels.triton_forms.<family>`, interpreted; skips the test where triton is absent."""
    if not has_triton():
        pytest.skip(NO_TRITON)
    _declare_forms()
    return importlib.import_module(f"sps2_kernels.triton_forms.{family}")


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Fails where a kernel in this dtype is too far from fp64: bf16 outputs are rounded to 8 bits."""
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual.double(), expected, atol=limit, rtol=limit)
