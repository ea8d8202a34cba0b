"""Triton form of `sps2_kernels.merge_states.merge_sampled`.

One program merges all parts into a block of tokens of one head: the parts' addresses and places come from a table,
so that one launch reads every plane of a receive buffer where it lies.
"""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from sps2_kernels.merge_states import SampledState
from sps2_kernels.shape import KernelShape
from sps2_kernels.triton_forms.launch import TYPE_NAMES, KernelKey, Tiles, device_table, jit, next_power_of_2
from sps2_kernels.triton_forms.merge_states import add_part

TILES = Tiles(16, 1, 4)
COLUMNS = tl.constexpr(11)
"""Numbers of a part in the table; see `_row`."""


@jit(unspecialized=("num_parts", "num_rows", "num_heads", "lse_row", "lse_head"))
def _merge_sampled(
    o_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    table_ptr: tl.tensor,
    out_ptr: tl.tensor,
    out_lse_ptr: tl.tensor,
    o_row: tl.tensor,
    o_head: tl.tensor,
    lse_row: tl.tensor,
    lse_head: tl.tensor,
    num_parts: tl.tensor,
    num_rows: tl.tensor,
    num_heads: tl.tensor,
    head_dim: tl.constexpr,
    block_m: tl.constexpr,
    block_d: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * block_m + tl.arange(0, block_m)
    head = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, block_d)
    valid = rows < num_rows
    in_head = (dims < head_dim)[None, :]
    acc = tl.load(
        o_ptr + rows[:, None] * o_row + head * o_head + dims[None, :],
        mask=valid[:, None] & in_head,
        other=0.0,
    ).to(tl.float32)
    top = tl.load(lse_ptr + rows * lse_row + head * lse_head, mask=valid, other=float("-inf"))
    total = tl.where(top == float("-inf"), 0.0, 1.0)
    acc = acc * total[:, None]
    for part in range(num_parts):
        entry = table_ptr + part * COLUMNS
        part_o = tl.load(entry).to(tl.pointer_type(o_ptr.dtype.element_ty))
        part_o = tl.multiple_of(part_o, 16)
        part_o_row = tl.multiple_of(tl.load(entry + 1), 16)
        part_o_head = tl.multiple_of(tl.load(entry + 2), 16)
        part_lse = tl.load(entry + 3).to(tl.pointer_type(tl.float32))
        part_lse_row, part_lse_head = tl.load(entry + 4), tl.load(entry + 5)
        part_rows = tl.load(entry + 6)
        first_row, stride = tl.load(entry + 7), tl.load(entry + 8)
        part_head = head - tl.load(entry + 9)
        if (part_head >= 0) & (part_head < tl.load(entry + 10)):
            since = rows - first_row
            index = since // stride
            mine = (since >= 0) & (since % stride == 0) & (index < part_rows)
            # Rows that the part does not have read nothing and add a weight of 0.
            lse = tl.load(
                part_lse + index * part_lse_row + part_head * part_lse_head, mask=mine, other=float("-inf")
            )
            o = tl.load(
                part_o + (index * part_o_row + part_head * part_o_head)[:, None] + dims[None, :],
                mask=mine[:, None] & in_head,
                other=0.0,
            )
            acc, top, total = add_part(acc, top, total, o.to(tl.float32), lse)
    safe_total = tl.where(total == 0.0, 1.0, total)  # of an empty row, whose acc is 0 and whose top is -inf
    merged = acc / safe_total[:, None]
    states = rows * num_heads + head
    tl.store(out_lse_ptr + states, top + tl.log(safe_total), mask=valid)
    out_ptrs = out_ptr + states[:, None] * head_dim + dims[None, :]
    tl.store(out_ptrs, merged.to(out_ptr.dtype.element_ty), mask=valid[:, None] & in_head)


def merge_sampled(o: Tensor, lse: Tensor, parts: Sequence[SampledState]) -> tuple[Tensor, Tensor]:
    """See `sps2_kernels.merge_states.merge_sampled`.

    Raises:
        ValueError: a part is of another dtype or device than o, or its addresses and strides are not multiples of
            16 elements and bytes, as they are for whole heads.
    """
    num_rows, num_heads, head_dim = o.shape
    merged = torch.empty(o.shape, dtype=o.dtype, device=o.device)
    merged_lse = torch.empty(num_rows, num_heads, dtype=torch.float32, device=o.device)
    if num_rows:
        table = device_table([_row(part, o) for part in parts] or [[0] * COLUMNS.value], o.device)
        _merge_sampled[-(-num_rows // TILES.block_m), num_heads](
            o, lse, table, merged, merged_lse, o.stride(0), o.stride(1), lse.stride(0), lse.stride(1),
            len(parts), num_rows, num_heads, **_constants(head_dim), num_warps=TILES.num_warps,
        )  # fmt: skip
    return merged, merged_lse


def _row(part: SampledState, whole: Tensor) -> list[int]:
    """A part's line of the table: where it lies, and where in the whole it belongs."""
    o, lse = part.o, part.lse
    if o.dtype != whole.dtype or o.device != whole.device or lse.dtype != torch.float32:
        raise ValueError(f"a part is {o.dtype} on {o.device} with {lse.dtype}, the whole {whole.dtype}")
    if o.data_ptr() % 16 or o.stride(0) % 16 or o.stride(1) % 16 or o.stride(2) != 1:
        raise ValueError(f"a part is not aligned: address {o.data_ptr():#x}, strides {o.stride()}")
    return [
        o.data_ptr(), o.stride(0), o.stride(1), lse.data_ptr(), lse.stride(0), lse.stride(1), len(o),
        part.first_row, part.stride, part.first_head, o.shape[1],
    ]  # fmt: skip


def _constants(head_dim: int) -> dict[str, object]:
    return {"head_dim": head_dim, "block_m": TILES.block_m, "block_d": next_power_of_2(head_dim)}


def compile_keys(shape: KernelShape) -> list[KernelKey]:
    """The keys that a model's calls compile."""
    name = TYPE_NAMES[shape.dtype]
    pointers = {
        "o_ptr": f"*{name}", "lse_ptr": "*fp32", "table_ptr": "*i64", "out_ptr": f"*{name}", "out_lse_ptr": "*fp32"
    }  # fmt: skip
    strides = dict.fromkeys(("o_row", "o_head"), "i32")
    counts = dict.fromkeys(("lse_row", "lse_head", "num_parts", "num_rows", "num_heads"), "i32")
    return [
        KernelKey(
            f"merge_sampled {name} d{shape.head_dim}",
            _merge_sampled,
            pointers | strides | counts,
            _constants(shape.head_dim),
            TILES,
            frozenset(pointers | strides),
        )
    ]
