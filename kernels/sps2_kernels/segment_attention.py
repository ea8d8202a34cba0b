"""Attention of a run of queries over a run of keys with a diagonal: the kernel of prefill.

Knows nothing of ranks, layers or caches.
"""

import torch
from torch import Tensor

from sps2_kernels.merge_states import merge_states
from sps2_kernels.tiled_attention import compiled_passes, has_tiles, tiled_attention, use_tiles

UNMASKED = 1 << 62
"""`q_off` with which every query sees every key."""


def segment_attention(q: Tensor, k: Tensor, v: Tensor, q_off: int, scale: float) -> tuple[Tensor, Tensor]:
    """Attention in which key j is visible to query i iff j <= i + q_off.

    CUDA tensors go to the Triton form, all others to the CPU form.

    Args:
        q: [queries, q_heads, head_dim], each head contiguous, other strides any.
        k, v: [keys, kv_heads, head_dim], likewise (a dilated view needs no copy); kv_heads divides q_heads.
        q_off: position of query 0 minus position of key 0; `UNMASKED` for a full rectangle.
        scale: factor on the scores, > 0.

    Returns:
        o [queries, q_heads, head_dim] in q's dtype and lse [queries, q_heads] fp32, natural log; a query that
        sees nothing has o = 0 and lse = -inf.

    Raises:
        ValueError: shapes, strides or scale are not as above.
    """
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{k.shape[1]} KV heads do not divide {q.shape[1]} query heads")
    if q.shape[2] != k.shape[2] or k.shape != v.shape:
        raise ValueError(f"shapes do not match: q {q.shape}, k {k.shape}, v {v.shape}")
    if not q.stride(2) == k.stride(2) == v.stride(2) == 1:
        raise ValueError("the elements of a head must be contiguous")
    if scale <= 0:
        raise ValueError(f"scale must be positive, not {scale}")
    if q.is_cuda:
        from sps2_kernels.triton_forms import segment_attention as form  # noqa: PLC0415 - see there

        return form.segment_attention(q, k, v, q_off, scale)
    return segment_attention_cpu(q, k, v, q_off, scale)


def segment_attention_cpu(q: Tensor, k: Tensor, v: Tensor, q_off: int, scale: float) -> tuple[Tensor, Tensor]:
    """CPU form of `segment_attention`, on torch's flash operator: a rectangle, a triangle, and their merge."""
    num_queries, num_keys = q.shape[0], k.shape[0]
    num_blind = min(num_queries, max(0, -q_off))  # leading queries that see no key
    if num_blind:
        o, lse = _empty_state(q)
        if num_blind < num_queries and num_keys:
            o[num_blind:], lse[num_blind:] = segment_attention_cpu(
                q[num_blind:], k, v, q_off + num_blind, scale
            )
        return o, lse
    if not num_queries or not num_keys:
        return _empty_state(q)
    if q_off >= num_keys - 1:
        return _attend(q, k, v, False, scale)
    if q_off == 0:
        return _attend(q, k[:num_queries], v[:num_queries], True, scale)
    parts = [
        _attend(q, k[:q_off], v[:q_off], False, scale),
        _attend(q, k[q_off : q_off + num_queries], v[q_off : q_off + num_queries], True, scale),
    ]
    return merge_states(torch.stack([o for o, _ in parts]), torch.stack([lse for _, lse in parts]))


def warm_up_attention(dtype: torch.dtype, device: torch.device) -> None:
    """Compiles the forms that `segment_attention` takes for such inputs; seconds, the first time on a machine."""
    if has_tiles(dtype, device):
        compiled_passes()


def _empty_state(q: Tensor) -> tuple[Tensor, Tensor]:
    o = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    return o, torch.full(q.shape[:2], float("-inf"), dtype=torch.float32, device=q.device)


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Full or top-left causal attention of non-empty inputs: tiles for much bf16 on a CPU, else torch's operator."""
    if use_tiles(q, k):
        return tiled_attention(q, k, v, causal, scale)
    num_queries, num_q_heads, head_dim = q.shape
    if k.shape[1] == 1 < num_q_heads and not causal:
        # The query heads of one KV head as rows: each block of keys is read once for all (3 to 12% faster).
        o, lse = _attend(q.reshape(num_queries * num_q_heads, 1, head_dim), k, v, False, scale)
        return o.view(num_queries, num_q_heads, head_dim), lse.view(num_queries, num_q_heads)
    q4, k4, v4 = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, heads, tokens, head_dim]
    # It kills the process on empty inputs (guarded above), takes strided views and does GQA itself.
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 - has no public name
    o, lse = flash(q4, k4, v4, 0.0, causal, scale=scale)
    return o[0].transpose(0, 1), lse[0].transpose(0, 1)
