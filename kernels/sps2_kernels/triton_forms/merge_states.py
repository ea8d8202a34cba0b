"""Triton form of `sps2_kernels.merge_states.merge_states`: one pass over the parts with a running maximum."""

import torch
import triton.language as tl
from torch import Tensor

from sps2_kernels.shape import KernelShape
from sps2_kernels.triton_forms.launch import TYPE_NAMES, KernelKey, Tiles, jit, next_power_of_2

TILES = Tiles(16, 1, 4)
"""16 rows of 128 fp32 are 8 KiB of loads in flight for a program."""


@jit()
def add_part(acc: tl.tensor, top: tl.tensor, total: tl.tensor, o: tl.tensor, lse: tl.tensor) -> tl.tuple:
    """Adds a state (o [rows, d], lse [rows]) to a running one: acc = sum of e^(lse_n - top) o_n, total likewise."""
    new_top = tl.maximum(top, lse)
    base = tl.where(
        new_top == float("-inf"), 0.0, new_top
    )  # nothing seen yet: e^(-inf - 0) is the 0 that is wanted
    shrink = tl.exp(top - base)
    weight = tl.exp(lse - base)
    return acc * shrink[:, None] + weight[:, None] * o, new_top, total * shrink + weight


@jit(unspecialized=("num_parts", "num_rows", "num_heads"))
def _merge_states(
    o_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    out_ptr: tl.tensor,
    out_lse_ptr: tl.tensor,
    o_part: tl.tensor,
    o_row: tl.tensor,
    o_head: tl.tensor,
    num_parts: tl.tensor,
    num_rows: tl.tensor,
    num_heads: tl.tensor,
    head_dim: tl.constexpr,
    block_m: tl.constexpr,
    block_d: tl.constexpr,
) -> None:
    states = tl.program_id(0).to(tl.int64) * block_m + tl.arange(0, block_m)  # of [rows, heads]
    dims = tl.arange(0, block_d)
    num_states = tl.cast(num_rows, tl.int64) * num_heads
    valid = states < num_states
    mask = valid[:, None] & (dims[None, :] < head_dim)
    o_ptrs = o_ptr + (states // num_heads * o_row + states % num_heads * o_head)[:, None] + dims[None, :]
    acc = tl.zeros([block_m, block_d], tl.float32)
    top = tl.full([block_m], float("-inf"), tl.float32)
    total = tl.zeros([block_m], tl.float32)
    for part in range(num_parts):
        index = tl.cast(part, tl.int64)
        lse = tl.load(lse_ptr + index * num_states + states, mask=valid, other=float("-inf"))
        o = tl.load(o_ptrs + index * o_part, mask=mask, other=0.0).to(tl.float32)
        acc, top, total = add_part(acc, top, total, o, lse)
    safe_total = tl.where(total == 0.0, 1.0, total)  # of an empty row, whose acc is 0 and whose top is -inf
    merged = acc / safe_total[:, None]
    tl.store(out_lse_ptr + states, top + tl.log(safe_total), mask=valid)
    out_ptrs = out_ptr + states[:, None] * head_dim + dims[None, :]
    tl.store(out_ptrs, merged.to(out_ptr.dtype.element_ty), mask=mask)


def merge_states(o: Tensor, lse: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """See `sps2_kernels.merge_states.merge_states`; `dtype` is the result's, by default o's."""
    num_parts, num_rows, num_heads, head_dim = o.shape
    merged = torch.empty(o.shape[1:], dtype=dtype or o.dtype, device=o.device)
    merged_lse = torch.empty(o.shape[1:3], dtype=torch.float32, device=o.device)
    programs = -(-num_rows * num_heads // TILES.block_m)
    if programs:
        _merge_states[(programs,)](
            o, lse.contiguous(), merged, merged_lse, o.stride(0), o.stride(1), o.stride(2),
            num_parts, num_rows, num_heads, **_constants(head_dim), num_warps=TILES.num_warps,
        )  # fmt: skip
    return merged, merged_lse


def _constants(head_dim: int) -> dict[str, object]:
    return {"head_dim": head_dim, "block_m": TILES.block_m, "block_d": next_power_of_2(head_dim)}


def compile_keys(shape: KernelShape) -> list[KernelKey]:
    """The keys that a model's calls compile: partial outputs of decode are fp32, those of an exchange are not."""
    name = TYPE_NAMES[shape.dtype]
    numbers = dict.fromkeys(("o_part", "o_row", "o_head", "num_parts", "num_rows", "num_heads"), "i32")
    keys = []
    for part in sorted({name, "fp32"}):
        pointers = {"o_ptr": f"*{part}", "lse_ptr": "*fp32", "out_ptr": f"*{name}", "out_lse_ptr": "*fp32"}
        keys.append(
            KernelKey(
                f"merge_states {part} to {name} d{shape.head_dim}",
                _merge_states,
                pointers | numbers,
                _constants(shape.head_dim),
                TILES,
                frozenset(pointers) | {"o_part", "o_row", "o_head"},
            )
        )
    return keys
