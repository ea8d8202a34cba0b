"""Attention of a run of queries over a run of keys with a diagonal: the kernel of prefill.

Knows nothing of ranks, layers or caches.
"""

import torch
from torch import Tensor

from sps2_kernels.merge_states import merge_states

UNMASKED = 1 << 62
"""`q_off` with which every query sees every key."""


def segment_attention(q: Tensor, k: Tensor, v: Tensor, q_off: int, scale: float) -> tuple[Tensor, Tensor]:
    """Attention in which key j is visible to query i iff j <= i + q_off.

    Args:
        q: [queries, q_heads, head_dim], any strides.
        k, v: [keys, kv_heads, head_dim], any strides (a dilated view needs no copy); kv_heads divides q_heads.
        q_off: position of query 0 minus position of key 0; `UNMASKED` for a full rectangle.
        scale: factor on the scores.

    Returns:
        o [queries, q_heads, head_dim] in q's dtype and lse [queries, q_heads] fp32, natural log; a query that
        sees nothing has o = 0 and lse = -inf.
    """
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{k.shape[1]} KV heads do not divide {q.shape[1]} query heads")
    num_queries, num_keys = q.shape[0], k.shape[0]
    num_blind = min(num_queries, max(0, -q_off))  # leading queries that see no key
    if num_blind:
        o, lse = _empty_state(q)
        if num_blind < num_queries and num_keys:
            o[num_blind:], lse[num_blind:] = segment_attention(q[num_blind:], k, v, q_off + num_blind, scale)
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


def _empty_state(q: Tensor) -> tuple[Tensor, Tensor]:
    o = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    return o, torch.full(q.shape[:2], float("-inf"), dtype=torch.float32, device=q.device)


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Full or top-left causal attention of non-empty inputs by torch's own fused operator of the device."""
    q4, k4, v4 = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, heads, tokens, head_dim]
    if q.is_cuda:
        return _attend_cuda(q4, k4, v4, causal, scale)
    # It kills the process on empty inputs (guarded above), takes strided views and does GQA itself.
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q4, k4, v4, 0.0, causal, scale=scale)
    return o[0].transpose(0, 1), lse[0].transpose(0, 1)


def _attend_cuda(q4: Tensor, k4: Tensor, v4: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The memory-efficient operator: the one that takes fp32 as well as bf16 and returns the log-sum-exp."""
    group = q4.shape[1] // k4.shape[1]
    num_queries = q4.shape[2]
    k4, v4 = k4.repeat_interleave(group, dim=1), v4.repeat_interleave(group, dim=1)
    o, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q4, k4, v4, None, True, 0.0, causal, scale=scale
    )
    return o[0].transpose(0, 1), lse[0, :, :num_queries].transpose(0, 1).float()
