"""Triton form of `sps2_kernels.rope_append`: one program reads all heads of a token once and writes each once."""

import torch
import triton.language as tl
from torch import Tensor

from sps2_kernels.shape import KernelShape
from sps2_kernels.triton_forms.launch import TYPE_NAMES, KernelKey, Tiles, jit, next_power_of_2

TILES = Tiles(8, 1, 4)
"""8 heads of a token at a time."""


@jit()
def _rotate_heads(
    x_ptr: tl.tensor,
    x_head: tl.tensor,
    out_ptr: tl.tensor,
    heads: tl.tensor,
    num_heads: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    half_dim: tl.constexpr,
) -> None:
    """Rotates some heads of one token: x_ptr at its head 0, out_ptr likewise and dense; cos, sin [half_dim padded]."""
    pairs = tl.arange(0, cos.shape[0])
    mask = (heads[:, None] < num_heads) & (pairs[None, :] < half_dim)
    first_ptrs = x_ptr + heads[:, None] * x_head + pairs[None, :]
    first = tl.load(first_ptrs, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(first_ptrs + half_dim, mask=mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + heads[:, None] * (2 * half_dim) + pairs[None, :]
    out_type = out_ptr.dtype.element_ty
    tl.store(out_ptrs, (first * cos[None, :] - second * sin[None, :]).to(out_type), mask=mask)
    tl.store(out_ptrs + half_dim, (second * cos[None, :] + first * sin[None, :]).to(out_type), mask=mask)


@jit(unspecialized=("num_q_heads", "num_kv_heads"))
def _rope_append(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    k_cache_ptr: tl.tensor,
    v_cache_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    out_ptr: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_row: tl.tensor,
    k_head: tl.tensor,
    v_row: tl.tensor,
    v_head: tl.tensor,
    cos_row: tl.tensor,
    sin_row: tl.tensor,
    num_q_heads: tl.tensor,
    num_kv_heads: tl.tensor,
    half_dim: tl.constexpr,
    block_m: tl.constexpr,
    block_half: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    pairs = tl.arange(0, block_half)
    steps = tl.arange(0, block_m).to(tl.int64)
    cos = tl.load(cos_ptr + token * cos_row + pairs, mask=pairs < half_dim, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * sin_row + pairs, mask=pairs < half_dim, other=0.0).to(tl.float32)
    out = out_ptr + token * num_q_heads * (2 * half_dim)
    for start in range(0, num_q_heads, block_m):
        _rotate_heads(q_ptr + token * q_row, q_head, out, start + steps, num_q_heads, cos, sin, half_dim)
    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        place = slot * num_kv_heads * (2 * half_dim)
        for start in range(0, num_kv_heads, block_m):
            heads = start + steps
            _rotate_heads(
                k_ptr + token * k_row, k_head, k_cache_ptr + place, heads, num_kv_heads, cos, sin, half_dim
            )
            mask = (heads[:, None] < num_kv_heads) & (pairs[None, :] < half_dim)
            v_ptrs = v_ptr + token * v_row + heads[:, None] * v_head + pairs[None, :]
            v_places = v_cache_ptr + place + heads[:, None] * (2 * half_dim) + pairs[None, :]
            tl.store(v_places, tl.load(v_ptrs, mask=mask), mask=mask)
            tl.store(v_places + half_dim, tl.load(v_ptrs + half_dim, mask=mask), mask=mask)


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """See `sps2_kernels.rope_append.rope_append`.

    Raises:
        ValueError: the cache or the elements of a head or row are not contiguous, or the cache has another dtype.
    """
    dense = k_cache.is_contiguous() and v_cache.is_contiguous() and slots.is_contiguous()
    if not dense or any(x.stride(-1) != 1 for x in (q, k, v, cos, sin)):
        raise ValueError("the cache, slots, and the elements of each head and row must be contiguous")
    if not q.dtype == k_cache.dtype == v_cache.dtype == k.dtype == v.dtype:
        raise ValueError(f"{q.dtype} projections, but a cache of {k_cache.dtype} and {v_cache.dtype}")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if len(q):
        _rope_append[(len(q),)](
            q, k, v, cos, sin, k_cache, v_cache, slots, out, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
            v.stride(0), v.stride(1), cos.stride(0), sin.stride(0), q.shape[1], k.shape[1],
            **_constants(q.shape[2]), num_warps=TILES.num_warps,
        )  # fmt: skip
    return out


def _constants(head_dim: int) -> dict[str, object]:
    return {"half_dim": head_dim // 2, "block_m": TILES.block_m, "block_half": next_power_of_2(head_dim // 2)}


def compile_keys(shape: KernelShape) -> list[KernelKey]:
    """The keys that a model's calls compile; cos and sin come in the model's dtype."""
    name = TYPE_NAMES[shape.dtype]
    tensors = dict.fromkeys(
        ("q_ptr", "k_ptr", "v_ptr", "cos_ptr", "sin_ptr", "k_cache_ptr", "v_cache_ptr"), f"*{name}"
    )
    pointers = tensors | {"slots_ptr": "*i64", "out_ptr": f"*{name}"}
    names = ("q_row", "q_head", "k_row", "k_head", "v_row", "v_head", "cos_row", "sin_row")
    strides = dict.fromkeys(names, "i32")
    return [
        KernelKey(
            f"rope_append {name} d{shape.head_dim}",
            _rope_append,
            pointers | strides | dict.fromkeys(("num_q_heads", "num_kv_heads"), "i32"),
            _constants(shape.head_dim),
            TILES,
            frozenset(pointers | strides),
        )
    ]
