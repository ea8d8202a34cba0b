"""All kernel keys that a model's calls compile: `compile_report` lists them, `warm_up` makes them on a GPU."""

from sps2_kernels.shape import KernelShape
from sps2_kernels.triton_forms import (
    csa_pack,
    merge_sampled,
    merge_states,
    paged_decode,
    rope_append,
    segment_attention,
)
from sps2_kernels.triton_forms.launch import KernelKey

FAMILIES = (segment_attention, paged_decode, merge_states, merge_sampled, csa_pack, rope_append)


def model_keys(shape: KernelShape) -> list[KernelKey]:
    """Keys of a model's shape, family by family."""
    return [key for family in FAMILIES for key in family.compile_keys(shape)]
