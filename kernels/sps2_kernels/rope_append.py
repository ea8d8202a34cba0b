"""Rotary embedding of q and k, and the append of k and v to the cache, in one pass over a layer's projections.

Knows nothing of frequencies or blocks: angles come as cos and sin, places as slots.
Source: Su et al., "RoFormer", 2021, in the half-split layout of the published checkpoints.
"""

import torch
from torch import Tensor


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
    """(a, b) -> (a cos - b sin, b cos + a sin), with a and b the first and second half of a head, in fp32.

    CUDA tensors go to the Triton form, all others to the CPU form.

    Args:
        q: [tokens, q_heads, head_dim], each head contiguous, other strides any.
        k, v: [tokens, kv_heads, head_dim], likewise.
        cos, sin: [tokens, head_dim / 2], each row contiguous.
        k_cache, v_cache: [slots, kv_heads, head_dim], contiguous; written in place, k rotated.
        slots: [tokens] int64, where each token's key and value go, no slot twice; a token whose slot is negative is
            kept elsewhere and not written.

    Returns:
        q rotated, [tokens, q_heads, head_dim], contiguous, in q's dtype.

    Raises:
        ValueError: shapes do not match.
    """
    if k.shape != v.shape or q.shape[::2] != k.shape[::2] or k_cache.shape[1:] != k.shape[1:]:
        raise ValueError(f"shapes do not match: q {q.shape}, k {k.shape}, v {v.shape}, cache {k_cache.shape}")
    if not cos.shape == sin.shape == (len(q), q.shape[2] // 2) or slots.shape != (len(q),):
        raise ValueError(f"{len(q)} tokens, but cos {cos.shape}, sin {sin.shape}, slots {slots.shape}")
    if q.is_cuda:
        from sps2_kernels.triton_forms import rope_append as form  # noqa: PLC0415 - see there

        return form.rope_append(q, k, v, cos, sin, k_cache, v_cache, slots)
    return rope_append_cpu(q, k, v, cos, sin, k_cache, v_cache, slots)


def rope_append_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """CPU form of `rope_append`."""
    rotated = _rotate(k, cos, sin)
    if len(slots) and int(slots.min()) < 0:
        here = (slots >= 0).nonzero().squeeze(1)
        slots, rotated, v = slots[here], rotated[here], v[here]
    k_cache.index_copy_(0, slots, rotated)
    v_cache.index_copy_(0, slots, v)
    return _rotate(q, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Tokens' heads x [tokens, heads, head_dim] rotated, in x's dtype; rounded once."""
    first, second = x.float().chunk(2, dim=-1)  # [tokens, heads, head_dim / 2]
    wide_cos, wide_sin = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, wide_cos, out=out_first).addcmul_(second, wide_sin, value=-1)
    torch.mul(second, wide_cos, out=out_second).addcmul_(first, wide_sin)
    return out.to(x.dtype)
