"""Triton form of `sps2_kernels.paged_decode`: split-KV flash decoding over a block table.

One program computes the query heads of one KV head of one row over one split of the row's keys, so that each key is
read once for all of them and few long rows still fill the device; `merge_states` joins the splits.
Source: Dao et al., "Flash-Decoding", 2023.
"""

import torch
import triton.language as tl
from torch import Tensor

from sps2_kernels.paged_decode import PAGE_TOKENS, PagedRows
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
from sps2_kernels.triton_forms.merge_states import merge_states
from sps2_kernels.triton_forms.segment_attention import LN_2, fold_keys

# By dtype and padded head size. Part of the stages goes into loading the table ahead. block_m is what the query heads
# of a KV head are padded to, at least 16 (tl.dot).
TILES = {
    (torch.bfloat16, 32): Tiles(16, 64, 4, 5),
    (torch.bfloat16, 64): Tiles(16, 64, 4, 5),
    (torch.bfloat16, 128): Tiles(16, 32, 4, 5),
    (torch.bfloat16, 256): Tiles(16, 64, 4, 5),
    (torch.float32, 32): Tiles(16, 64, 4, 5),
    (torch.float32, 64): Tiles(16, 32, 4, 5),
    (torch.float32, 128): Tiles(16, 32, 4, 5),
    (torch.float32, 256): Tiles(16, 16, 8, 5),
}

TARGET_PROGRAMS = 4 * 132
"""Programs at which an H100 or H200 is full: its multiprocessors, times what fits on one."""
MIN_SPLIT_TOKENS = 512
"""Keys below which a split costs more to merge than it saves."""
MAX_SPLITS = 64


def num_splits(num_rows: int, num_kv_heads: int, max_len: int) -> int:
    """Parts that the keys of every row are cut into: as many as fill the device while each stays worth it."""
    wanted = TARGET_PROGRAMS // max(1, num_rows * num_kv_heads)
    return max(1, min(wanted, max_len // MIN_SPLIT_TOKENS, MAX_SPLITS))


@jit(unspecialized=("table_row", "fold"))
def _paged_decode(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    table_ptr: tl.tensor,
    len_ptr: tl.tensor,
    o_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    slot_stride: tl.tensor,
    table_row: tl.tensor,
    fold: tl.tensor,
    scale_log2: tl.tensor,
    head_dim: tl.constexpr,
    page_tokens: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
    upcast: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    tl.static_assert(block_m >= 16 and block_n >= 16 and block_d >= 16, "tl.dot needs 16 on every side")
    tl.static_assert(page_tokens % block_n == 0, "a step stays within a page")
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    num_heads = tl.num_programs(1) * fold
    heads = tl.arange(0, block_m)
    dims = tl.arange(0, block_d)
    steps = tl.arange(0, block_n)
    q_mask = (heads[:, None] < fold) & (dims[None, :] < head_dim)
    q_rows = row * num_heads + kv_head * fold + heads  # [m]
    q = tl.load(q_ptr + q_rows[:, None] * head_dim + dims[None, :], mask=q_mask, other=0.0)
    if upcast:
        q = q.to(tl.float32)
    kv_len = tl.load(len_ptr + row)
    # A split is a whole number of steps; the last ones of a short row may be empty.
    split_len = tl.cdiv(tl.cdiv(kv_len, block_n), tl.num_programs(2)) * block_n
    begin = split * split_len
    end = tl.minimum(begin + split_len, kv_len)
    full = tl.maximum(end - begin, 0) // block_n * block_n + begin
    k_offsets = steps.to(tl.int64)[None, :] * slot_stride + kv_head * head_dim + dims[:, None]  # [d, n]
    v_offsets = steps.to(tl.int64)[:, None] * slot_stride + kv_head * head_dim + dims[None, :]  # [n, d]
    acc = tl.zeros([block_m, block_d], tl.float32)
    top = tl.full([block_m], float("-inf"), tl.float32)
    total = tl.zeros([block_m], tl.float32)
    last_visible = heads * 0 + kv_len
    for start in range(begin, full, block_n):
        page = tl.load(table_ptr + row * table_row + start // page_tokens).to(tl.int64)
        slot = (page * page_tokens + start % page_tokens) * slot_stride
        acc, top, total = fold_keys(
            acc, top, total, q, k_ptr + slot + k_offsets, v_ptr + slot + v_offsets,
            start + steps, kv_len, last_visible, scale_log2, head_dim, False, upcast, precision,
        )  # fmt: skip
    for start in tl.range(full, end, block_n, num_stages=1):
        page = tl.load(table_ptr + row * table_row + start // page_tokens).to(tl.int64)
        slot = (page * page_tokens + start % page_tokens) * slot_stride
        acc, top, total = fold_keys(
            acc, top, total, q, k_ptr + slot + k_offsets, v_ptr + slot + v_offsets,
            start + steps, kv_len, last_visible, scale_log2, head_dim, True, upcast, precision,
        )  # fmt: skip
    safe_total = tl.where(total == 0.0, 1.0, total)  # of an empty row, whose acc is 0 and whose top is -inf
    o = acc / safe_total[:, None]
    lse = (top + tl.log2(safe_total)) * LN_2
    state = split.to(tl.int64) * tl.num_programs(0) * num_heads + q_rows  # [splits, rows, heads]
    tl.store(lse_ptr + state, lse, mask=heads < fold)
    tl.store(o_ptr + state[:, None] * head_dim + dims[None, :], o.to(o_ptr.dtype.element_ty), mask=q_mask)


def paged_decode_partial(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, rows: PagedRows, scale: float, splits: int | None = None
) -> tuple[Tensor, Tensor]:
    """See `sps2_kernels.paged_decode.paged_decode_partial`.

    Args:
        q, k_cache, v_cache, rows, scale: as there.
        splits: parts that each row's keys are cut into; by default what fills the device.

    Raises:
        KeyError: no configuration for the dtype and head size.
        ValueError: a tensor is not contiguous, or runs are not whole pages.
    """
    if not (q.is_contiguous() and k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("q and the cache must be contiguous")
    num_rows, num_q_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    splits = splits or num_splits(num_rows, num_kv_heads, rows.max_len)
    o = torch.empty(splits, *q.shape, dtype=q.dtype if splits == 1 else torch.float32, device=q.device)
    lse = torch.empty(splits, num_rows, num_q_heads, dtype=torch.float32, device=q.device)
    if not num_rows:
        return o[0], lse[0]
    fold = num_q_heads // num_kv_heads
    tiles = TILES[q.dtype, next_power_of_2(head_dim)]
    _paged_decode[num_rows, num_kv_heads, splits](
        q, k_cache, v_cache, rows.block_table, rows.kv_len, o, lse,
        k_cache.stride(0), rows.block_table.stride(0), fold, scale * LOG2_E,
        **_constants(fold, head_dim, tiles, upcast=interpreted(q)),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    if splits == 1:
        return o[0], lse[0]
    merged, merged_lse = merge_states(o, lse, q.dtype)
    return merged, merged_lse


def _constants(fold: int, head_dim: int, tiles: Tiles, *, upcast: bool) -> dict[str, object]:
    return {
        "head_dim": head_dim,
        "page_tokens": PAGE_TOKENS,
        "block_m": max(tiles.block_m, next_power_of_2(fold)),
        "block_n": tiles.block_n,
        "block_d": next_power_of_2(head_dim),
        "upcast": upcast,
        "precision": tiles.precision,
    }


def compile_keys(shape: KernelShape) -> list[KernelKey]:
    """The keys that a model's calls compile: with one split the output is final, with several it is fp32."""
    name, tiles = TYPE_NAMES[shape.dtype], TILES[shape.dtype, next_power_of_2(shape.head_dim)]
    inputs = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{name}")
    tables = {"table_ptr": "*i32", "len_ptr": "*i32"}
    numbers = {"slot_stride": "i32", "table_row": "i32", "fold": "i32", "scale_log2": "fp32"}
    keys = []
    for out in sorted({name, "fp32"}):
        outputs = {"o_ptr": f"*{out}", "lse_ptr": "*fp32"}
        keys.append(
            KernelKey(
                f"paged_decode {name} d{shape.head_dim} fold{shape.fold} to {out}",
                _paged_decode,
                inputs | tables | outputs | numbers,
                _constants(shape.fold, shape.head_dim, tiles, upcast=False),
                tiles,
                frozenset(inputs | tables | outputs) | {"slot_stride"},
            )
        )
    return keys
