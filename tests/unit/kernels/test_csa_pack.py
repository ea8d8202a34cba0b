"""Packing of sampled planes: interpreter == CPU form == reference, pack then unpack is identity, no stale read."""

import pytest
import torch
from torch import Tensor

from sps2_kernels import reference
from sps2_kernels.csa_pack import csa_pack, csa_pack_cpu, csa_unpack_cpu
from sps2_kernels.shape import HEAD_DIMS
from support.triton_interpreter import interpreted_form

CANARY = -77.0


def planes_of(q: Tensor, k: Tensor) -> list[Tensor]:
    """Dilated rows of some heads, a whole tensor, a single row, and nothing."""
    return [q[3::8, 1:3], k[3::8, 1:], q[:0], k, q[5:6, :1], k[::2, :1]]


def num_elements(planes: list[Tensor]) -> int:
    return sum(plane.numel() for plane in planes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_there_and_back(dtype: torch.dtype, head_dim: int) -> None:
    q, k = torch.randn(37, 4, head_dim).to(dtype), torch.randn(37, 2, head_dim).to(dtype)
    planes = planes_of(q, k)
    expected = torch.tensor(reference.csa_pack(planes), dtype=dtype)
    form = interpreted_form("csa_pack")
    for pack, unpack in ((csa_pack_cpu, csa_unpack_cpu), (form.csa_pack, form.csa_unpack)):
        packed = torch.full((num_elements(planes),), CANARY, dtype=dtype)
        pack(planes, packed)
        assert torch.equal(packed, expected)
        new_q, new_k = torch.full_like(q, CANARY), torch.full_like(k, CANARY)
        unpack(packed, planes_of(new_q, new_k))
        assert torch.equal(new_k, k)
        read_back = new_q != CANARY
        assert torch.equal(new_q[read_back], q[read_back])
        assert int(read_back.sum()) == planes[0].numel() + planes[4].numel(), "an element outside was written"


def test_nothing_to_pack() -> None:
    for pack in (csa_pack_cpu, interpreted_form("csa_pack").csa_pack):
        pack([], torch.empty(0))


def test_the_buffer_must_fit() -> None:
    with pytest.raises(ValueError, match="64 elements, but a buffer of"):
        csa_pack([torch.zeros(2, 1, 32)], torch.empty(65))


@pytest.mark.parametrize(
    ("second", "message"),
    [(torch.zeros(2, 1, 64), "heads of 64"), (torch.zeros(129)[1:].view(2, 2, 32), "not aligned")],
)
def test_what_one_launch_cannot_take_is_refused(second: Tensor, message: str) -> None:
    planes = [torch.zeros(2, 1, 32), second]
    with pytest.raises(ValueError, match=message):
        interpreted_form("csa_pack").csa_pack(planes, torch.empty(num_elements(planes)))
