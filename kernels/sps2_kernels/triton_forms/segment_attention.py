"""Triton form of `sps2_kernels.segment_attention`: flash attention with a diagonal.

One program computes a block of queries of one head. Keys that every query of the block sees go through a loop
without a mask, those on the diagonal through one with it. Softmax runs in base 2 with a running maximum.
Source: Dao, "FlashAttention-2", 2023.
"""

import torch
import triton.language as tl
from torch import Tensor

from sps2_kernels.shape import KernelShape
from sps2_kernels.triton_forms.launch import (
    LOG2_E,
    TYPE_NAMES,
    KernelKey,
    Tiles,
    interpreted,
    jit,
    next_power_of_2,
)

# Tiles by dtype and padded head size. bf16: two warp groups, each with 64 rows of a wgmma. fp32 runs on the tensor
# cores too, as three tf32 products, whose operands take many registers.
TILES = {
    (torch.bfloat16, 32): Tiles(128, 128, 8, 3),
    (torch.bfloat16, 64): Tiles(128, 128, 8, 3),
    (torch.bfloat16, 128): Tiles(128, 128, 8, 2),
    (torch.bfloat16, 256): Tiles(128, 32, 8, 3),
    (torch.float32, 32): Tiles(64, 64, 4, 2),
    (torch.float32, 64): Tiles(64, 32, 4, 2),
    (torch.float32, 128): Tiles(16, 32, 4, 2),
    (torch.float32, 256): Tiles(32, 32, 8, 1, "ieee"),  # three products of tf32 would spill
}


LN_2 = tl.constexpr(1 / LOG2_E)


@jit()
def fold_keys(
    acc: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    q: tl.tensor,
    k_tile: tl.tensor,
    v_tile: tl.tensor,
    columns: tl.tensor,
    num_valid: tl.tensor,
    last_visible: tl.tensor,
    scale_log2: tl.tensor,
    head_dim: tl.constexpr,
    masked: tl.constexpr,
    upcast: tl.constexpr,
    precision: tl.constexpr,
) -> tl.tuple:
    """One step of the online softmax; returns acc [m, d], and the running maximum `top` and sum `total` [m].

    q is [m, d]; k_tile [d, n] and v_tile [n, d] are pointers. With `masked`, column c counts for row r iff
    c <= last_visible[r], and columns from num_valid on are not loaded.
    """
    block_d: tl.constexpr = q.shape[1]
    dims = tl.arange(0, block_d)
    if masked:
        valid = columns < num_valid
        k = tl.load(k_tile, mask=(dims[:, None] < head_dim) & valid[None, :], other=0.0)
        v = tl.load(v_tile, mask=valid[:, None] & (dims[None, :] < head_dim), other=0.0)
    elif head_dim < block_d:
        k = tl.load(k_tile, mask=dims[:, None] < head_dim, other=0.0)
        v = tl.load(v_tile, mask=dims[None, :] < head_dim, other=0.0)
    else:
        k = tl.load(k_tile)
        v = tl.load(v_tile)
    if upcast:
        k, v = k.to(tl.float32), v.to(tl.float32)
    scores = tl.dot(q, k, input_precision=precision)  # [m, n]; bf16 operands ignore the precision
    if masked:
        seen = (columns[None, :] <= last_visible[:, None]) & (columns < num_valid)[None, :]
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
    # A row that has seen nothing yet has no maximum to subtract: exp2(-inf - 0) is the 0 that is wanted.
    base = tl.where(new_top == float("-inf"), 0.0, new_top) if masked else new_top
    weights = tl.exp2(scores * scale_log2 - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=precision)
    return acc, new_top, total


@jit(unspecialized=("num_queries", "num_keys", "q_off", "fold"))
def _segment_attention(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    o_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_row: tl.tensor,
    k_head: tl.tensor,
    v_row: tl.tensor,
    v_head: tl.tensor,
    num_queries: tl.tensor,
    num_keys: tl.tensor,
    q_off: tl.tensor,
    scale_log2: tl.tensor,
    fold: tl.tensor,
    head_dim: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
    upcast: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    tl.static_assert(block_m >= 16 and block_n >= 16 and block_d >= 16, "tl.dot needs 16 on every side")
    # The last blocks see most keys under a diagonal: they start first, so that no long one is left over at the end.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * block_m
    head = tl.program_id(1).to(tl.int64)
    num_heads = tl.num_programs(1)
    rows = first + tl.arange(0, block_m)
    dims = tl.arange(0, block_d)
    steps = tl.arange(0, block_n)
    q_mask = (rows[:, None] < num_queries) & (dims[None, :] < head_dim)
    q = tl.load(
        q_ptr + rows.to(tl.int64)[:, None] * q_row + head * q_head + dims[None, :], mask=q_mask, other=0.0
    )
    if upcast:
        q = q.to(tl.float32)
    k_base = k_ptr + head // fold * k_head
    v_base = v_ptr + head // fold * v_head
    k_offsets = steps.to(tl.int64)[None, :] * k_row + dims[:, None]  # [d, n]
    v_offsets = steps.to(tl.int64)[:, None] * v_row + dims[None, :]  # [n, d]
    acc = tl.zeros([block_m, block_d], tl.float32)
    top = tl.full([block_m], float("-inf"), tl.float32)
    total = tl.zeros([block_m], tl.float32)
    last_visible = rows + q_off
    all_see = tl.minimum(num_keys, tl.maximum(first + q_off + 1, 0)) // block_n * block_n
    some_see = tl.minimum(num_keys, tl.minimum(first + block_m, num_queries) + q_off)
    for start in range(0, all_see, block_n):
        begin = tl.cast(start, tl.int64)
        acc, top, total = fold_keys(
            acc, top, total, q, k_base + begin * k_row + k_offsets, v_base + begin * v_row + v_offsets,
            start + steps, num_keys, last_visible, scale_log2, head_dim, False, upcast, precision,
        )  # fmt: skip
    # Short, and not pipelined: after a second pipelined loop ptxas would serialise the wgmmas of both.
    for start in tl.range(all_see, some_see, block_n, num_stages=1):
        begin = tl.cast(start, tl.int64)
        acc, top, total = fold_keys(
            acc, top, total, q, k_base + begin * k_row + k_offsets, v_base + begin * v_row + v_offsets,
            start + steps, num_keys, last_visible, scale_log2, head_dim, True, upcast, precision,
        )  # fmt: skip
    safe_total = tl.where(total == 0.0, 1.0, total)  # of an empty row, whose acc is 0 and whose top is -inf
    o = acc / safe_total[:, None]
    lse = (top + tl.log2(safe_total)) * LN_2
    state = rows.to(tl.int64) * num_heads + head
    tl.store(lse_ptr + state, lse, mask=rows < num_queries)
    tl.store(o_ptr + state[:, None] * head_dim + dims[None, :], o.to(o_ptr.dtype.element_ty), mask=q_mask)


def segment_attention(q: Tensor, k: Tensor, v: Tensor, q_off: int, scale: float) -> tuple[Tensor, Tensor]:
    """See `sps2_kernels.segment_attention.segment_attention`.

    Fast where addresses and strides are multiples of 16 bytes, as they are for whole heads.

    Raises:
        KeyError: no configuration for the dtype and head size.
    """
    num_queries, num_q_heads, head_dim = q.shape
    tiles = TILES[q.dtype, next_power_of_2(head_dim)]
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(num_queries, num_q_heads, dtype=torch.float32, device=q.device)
    if not num_queries:
        return o, lse
    bounded_off = max(-num_queries, min(q_off, len(k)))  # the same mask, in the range of 32 bits
    _segment_attention[-(-num_queries // tiles.block_m), num_q_heads](
        q, k, v, o, lse, q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        num_queries, len(k), bounded_off, scale * LOG2_E, num_q_heads // k.shape[1],
        **_constants(head_dim, tiles, upcast=interpreted(q)),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return o, lse


def _constants(head_dim: int, tiles: Tiles, *, upcast: bool) -> dict[str, object]:
    return {
        "head_dim": head_dim,
        "block_m": tiles.block_m,
        "block_n": tiles.block_n,
        "block_d": next_power_of_2(head_dim),
        "upcast": upcast,
        "precision": tiles.precision,
    }


def compile_keys(shape: KernelShape) -> list[KernelKey]:
    """The keys that a model's calls compile."""
    name, tiles = TYPE_NAMES[shape.dtype], TILES[shape.dtype, next_power_of_2(shape.head_dim)]
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "o_ptr"), f"*{name}") | {"lse_ptr": "*fp32"}
    strides = dict.fromkeys(("q_row", "q_head", "k_row", "k_head", "v_row", "v_head"), "i32")
    counts = dict.fromkeys(("num_queries", "num_keys", "q_off", "fold"), "i32") | {"scale_log2": "fp32"}
    return [
        KernelKey(
            f"segment_attention {name} d{shape.head_dim}",
            _segment_attention,
            pointers | strides | counts,
            _constants(shape.head_dim, tiles, upcast=False),
            tiles,
            frozenset(pointers | strides),
        )
    ]
