"""Kernels compile for sm_90 as they should; the rest of the keys are compiled by the acceptance suite."""

import pytest
import torch

from sps2_kernels.shape import HEAD_DIMS, KernelShape
from support.compiled_keys import assert_fits, compiled_keys
from support.triton_interpreter import interpreted_form


@pytest.mark.timeout(300)
def test_a_subset_of_keys_compiles() -> None:
    """One model's bf16 keys (head size 128), and the prefill kernel of head size 64."""
    listing = compiled_keys("bf16.* d128|^segment_attention bf16 d64", timeout_s=280)
    assert len(listing) == 10
    for key in listing:
        assert_fits(key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_family_has_keys_for_every_shape(head_dim: int, dtype: torch.dtype) -> None:
    keys = interpreted_form("keys")
    listed = keys.model_keys(KernelShape(14, 2, head_dim, dtype))
    assert len({key.name for key in listed}) == len(listed)
    families = {family.__name__.rpartition(".")[2] for family in keys.FAMILIES}
    prefixes = {key.name.partition(" ")[0] for key in listed}
    assert prefixes - {"csa_unpack"} == families
