"""Triton form of `sps2_kernels.csa_pack`: all planes in one launch, their addresses and strides from a table."""

from collections.abc import Sequence

import triton.language as tl
from torch import Tensor

from sps2_kernels.csa_pack import plane_offsets
from sps2_kernels.shape import KernelShape
from sps2_kernels.triton_forms.launch import TYPE_NAMES, KernelKey, Tiles, device_table, jit, next_power_of_2

TILES = Tiles(32, 1, 4)
"""32 heads of 128 bf16 are 8 KiB for a program: 4 loads of 16 bytes for each thread."""
COLUMNS = tl.constexpr(6)
"""Numbers of a plane in the table; see `_launch`."""


@jit()
def _copy_planes(
    packed_ptr: tl.tensor,
    table_ptr: tl.tensor,
    head_dim: tl.constexpr,
    block_m: tl.constexpr,
    block_d: tl.constexpr,
    pack: tl.constexpr,
) -> None:
    entry = table_ptr + tl.program_id(1) * COLUMNS
    plane = tl.multiple_of(tl.load(entry).to(tl.pointer_type(packed_ptr.dtype.element_ty)), 16)
    row_stride = tl.multiple_of(tl.load(entry + 1), 16)
    head_stride = tl.multiple_of(tl.load(entry + 2), 16)
    num_rows, num_heads = tl.load(entry + 3), tl.load(entry + 4)
    offset = tl.multiple_of(tl.load(entry + 5), 16)
    # Planes differ in length: the grid is made for the longest, and the rest of a short one's programs end here.
    if tl.program_id(0) * block_m < num_rows * num_heads:
        lines = tl.program_id(0).to(tl.int64) * block_m + tl.arange(0, block_m)  # of [rows, heads]
        dims = tl.arange(0, block_d)
        mask = (lines < num_rows * num_heads)[:, None] & (dims[None, :] < head_dim)
        strided = (
            plane
            + (lines // num_heads * row_stride + lines % num_heads * head_stride)[:, None]
            + dims[None, :]
        )
        dense = packed_ptr + offset + lines[:, None] * head_dim + dims[None, :]
        if pack:
            tl.store(dense, tl.load(strided, mask=mask), mask=mask)
        else:
            tl.store(strided, tl.load(dense, mask=mask), mask=mask)


def csa_pack(planes: Sequence[Tensor], packed: Tensor) -> None:
    """See `sps2_kernels.csa_pack.csa_pack`.

    Raises:
        ValueError: planes differ in head size or dtype, or an address or stride is not a multiple of 16 bytes and
            elements, as those of whole heads are.
    """
    _launch(planes, packed, pack=True)


def csa_unpack(packed: Tensor, planes: Sequence[Tensor]) -> None:
    """See `sps2_kernels.csa_pack.csa_unpack`; raises as `csa_pack`."""
    _launch(planes, packed, pack=False)


def _launch(planes: Sequence[Tensor], packed: Tensor, *, pack: bool) -> None:
    if not packed.numel():
        return
    head_dim = planes[0].shape[2]
    for plane in (*planes, packed.view(-1, 1, head_dim)):
        strides = plane.stride()
        if plane.dtype != packed.dtype or plane.device != packed.device or plane.shape[2] != head_dim:
            raise ValueError(
                f"{plane.dtype} heads of {plane.shape[2]} among {packed.dtype} heads of {head_dim}"
            )
        if plane.data_ptr() % 16 or strides[0] % 16 or strides[1] % 16 or strides[2] != 1:
            raise ValueError(f"a plane is not aligned: address {plane.data_ptr():#x}, strides {strides}")
    table = [
        [plane.data_ptr(), plane.stride(0), plane.stride(1), plane.shape[0], plane.shape[1], offset]
        for plane, offset in zip(planes, plane_offsets(planes), strict=False)
    ]
    longest = max(plane.shape[0] * plane.shape[1] for plane in planes)
    _copy_planes[-(-longest // TILES.block_m), len(planes)](
        packed,
        device_table(table, packed.device),
        **_constants(head_dim, pack=pack),
        num_warps=TILES.num_warps,
    )


def _constants(head_dim: int, *, pack: bool) -> dict[str, object]:
    return {
        "head_dim": head_dim,
        "block_m": TILES.block_m,
        "block_d": next_power_of_2(head_dim),
        "pack": pack,
    }


def compile_keys(shape: KernelShape) -> list[KernelKey]:
    """The keys that a model's calls compile."""
    name = TYPE_NAMES[shape.dtype]
    pointers = {"packed_ptr": f"*{name}", "table_ptr": "*i64"}
    return [
        KernelKey(
            f"csa_{'pack' if pack else 'unpack'} {name} d{shape.head_dim}",
            _copy_planes,
            pointers,
            _constants(shape.head_dim, pack=pack),
            TILES,
            frozenset(pointers),
        )
        for pack in (True, False)
    ]
