"""Gathers planes of q, k and v (sampled rows of some heads) straight into a flat send buffer, and back.

Knows nothing of ranks: a plane is a strided view, and who gets it is the caller's.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate

from torch import Tensor


def csa_pack(planes: Sequence[Tensor], packed: Tensor) -> None:
    """Writes planes one after another, each as [rows, heads, head_dim] without gaps.

    CUDA tensors go to the Triton form (one launch for all planes), all others to the CPU form.

    Args:
        planes: each [rows, heads, head_dim], each head contiguous, other strides any, in packed's dtype; rows may
            differ from plane to plane, and may be 0.
        packed: [elements], contiguous, exactly as long as all planes together.

    Raises:
        ValueError: the lengths do not match.
    """
    _check(planes, packed)
    if packed.is_cuda:
        from sps2_kernels.triton_forms import csa_pack as form  # noqa: PLC0415 - see there

        form.csa_pack(planes, packed)
    else:
        csa_pack_cpu(planes, packed)


def csa_unpack(packed: Tensor, planes: Sequence[Tensor]) -> None:
    """The way back: reads `packed` into planes; arguments and errors as `csa_pack`."""
    _check(planes, packed)
    if packed.is_cuda:
        from sps2_kernels.triton_forms import csa_pack as form  # noqa: PLC0415 - see there

        form.csa_unpack(packed, planes)
    else:
        csa_unpack_cpu(packed, planes)


def csa_pack_cpu(planes: Sequence[Tensor], packed: Tensor) -> None:
    """CPU form of `csa_pack`."""
    for plane, place in _places(planes, packed):
        place.copy_(plane)


def csa_unpack_cpu(packed: Tensor, planes: Sequence[Tensor]) -> None:
    """CPU form of `csa_unpack`."""
    for plane, place in _places(planes, packed):
        plane.copy_(place)


def plane_offsets(planes: Sequence[Tensor]) -> list[int]:
    """Where each plane begins in the buffer, in elements, and behind them the buffer's length."""
    return list(accumulate((plane.numel() for plane in planes), initial=0))


def _places(planes: Sequence[Tensor], packed: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each plane with its part of the buffer, in the plane's shape."""
    for plane, offset in zip(planes, plane_offsets(planes), strict=False):
        yield plane, packed[offset : offset + plane.numel()].view(plane.shape)


def _check(planes: Sequence[Tensor], packed: Tensor) -> None:
    total = plane_offsets(planes)[-1]
    if packed.shape != (total,) or not packed.is_contiguous():
        raise ValueError(f"planes of {total} elements, but a buffer of {tuple(packed.shape)}")
