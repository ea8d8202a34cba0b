"""Loads the Triton forms so that they run in triton's interpreter, on CPU tensors.

Triton reads TRITON_INTERPRET when a kernel is declared (its own library's kernels too), so whoever imports triton
first decides for the process. The variable is set for that moment only, since the ranks that other tests start must
not inherit it.
"""

import importlib.util
import os
from functools import cache
from types import ModuleType

import pytest
import torch

NO_TRITON = "triton is not installed"


def has_triton() -> bool:
    """Whether triton is installed; does not import it."""
    return importlib.util.find_spec("triton") is not None


@cache
def import_interpreted() -> None:
    """Imports all Triton forms, interpreted; to be called before anything else imports triton.

    Raises:
        RuntimeError: something did.
    """
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        importlib.import_module("sps2_kernels.triton_forms.keys")
        merge_states = importlib.import_module("sps2_kernels.triton_forms.merge_states").merge_states
        merge_states(
            torch.zeros(1, 1, 1, 32), torch.zeros(1, 1, 1)
        )  # the first launch imports more of triton
        if type(importlib.import_module("triton.language").zeros).__name__ != "InterpretedFunction":
            raise RuntimeError(
                "triton was imported for compilation before it was imported for its interpreter"
            )
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


def interpreted_form(family: str) -> ModuleType:
    """The module `sps2_kernels.triton_forms.<family>`, interpreted; skips the test where triton is absent."""
    if not has_triton():
        pytest.skip(NO_TRITON)
    import_interpreted()
    return importlib.import_module(f"sps2_kernels.triton_forms.{family}")


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Fails where a kernel in this dtype is too far from fp64: bf16 outputs are rounded to 8 bits."""
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual.double(), expected, atol=limit, rtol=limit)
