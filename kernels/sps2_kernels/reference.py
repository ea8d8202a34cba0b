"""Plain fp64 twins of every kernel: slow, obvious, and the oracle of the tests.

They build full score matrices, so they are for short inputs only and are never imported by the engine.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def _expand_kv(kv: Tensor, num_q_heads: int) -> Tensor:
    """[keys, kv_heads, head_dim] -> [keys, q_heads, head_dim]: query head h reads KV head h // (Hq / Hkv)."""
    return kv.repeat_interleave(num_q_heads // kv.shape[1], dim=1)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention under an explicit mask, in fp64.

    q [queries, q_heads, head_dim]; k, v [keys, kv_heads, head_dim]; visible [queries, keys] bool.
    Returns o [queries, q_heads, head_dim] and the natural log-sum-exp [queries, q_heads]; a query that sees
    nothing has o = 0, lse = -inf.
    """
    q64, k64, v64 = q.double(), _expand_kv(k, q.shape[1]).double(), _expand_kv(v, q.shape[1]).double()
    scores = torch.einsum("qhd,khd->qhk", q64, k64) * scale
    scores = scores.masked_fill(~visible[:, None, :], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse.isneginf(), 0.0)[..., None])
    return torch.einsum("qhk,khd->qhd", weights, v64), lse


def segment_attention(q: Tensor, k: Tensor, v: Tensor, q_off: int, scale: float) -> tuple[Tensor, Tensor]:
    """Twin of `sps2_kernels.segment_attention`: key j is visible to query i iff j <= i + q_off."""
    i = torch.arange(q.shape[0])[:, None]
    j = torch.arange(k.shape[0])[None, :]
    return masked_attention(q, k, v, j <= i + q_off, scale)


def paged_decode_partial(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: list[list[int]], scale: float
) -> tuple[Tensor, Tensor]:
    """Twin of `sps2_kernels.paged_decode_partial`, with each row's cache slots listed one by one."""
    rows = []
    for row, ids in enumerate(slots):
        index = torch.tensor(ids, dtype=torch.int64)
        visible = torch.ones(1, len(ids), dtype=torch.bool)
        rows.append(masked_attention(q[row : row + 1], k_cache[index], v_cache[index], visible, scale))
    return torch.cat([o for o, _ in rows]), torch.cat([lse for _, lse in rows])


def merge_states(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Twin of `sps2_kernels.merge_states`: o [parts, tokens, heads, head_dim], lse [parts, tokens, heads]."""
    total = torch.logsumexp(lse.double(), dim=0)
    weights = torch.exp(lse.double() - total.masked_fill(total.isneginf(), 0.0))
    return (weights[..., None] * o.double()).sum(dim=0), total


def merge_sampled(
    o: Tensor, lse: Tensor, parts: Sequence[tuple[Tensor, Tensor, int, int, int]]
) -> tuple[Tensor, Tensor]:
    """Twin of `sps2_kernels.merge_sampled`, each part as (o, lse, first row, stride, first head).

    Every part is spread over a whole that saw nothing elsewhere, and all wholes are merged.
    """
    wholes, whole_lses = [o.double()], [lse.double()]
    for part_o, part_lse, first_row, stride, first_head in parts:
        spread, spread_lse = torch.zeros_like(wholes[0]), torch.full_like(whole_lses[0], float("-inf"))
        for row in range(part_o.shape[0]):
            for head in range(part_o.shape[1]):
                spread[first_row + row * stride, first_head + head] = part_o[row, head].double()
                spread_lse[first_row + row * stride, first_head + head] = part_lse[row, head].double()
        wholes.append(spread)
        whole_lses.append(spread_lse)
    return merge_states(torch.stack(wholes), torch.stack(whole_lses))


def csa_pack(planes: Sequence[Tensor]) -> list[float]:
    """Twin of `sps2_kernels.csa_pack`: the elements of the buffer, one by one."""
    return [x for plane in planes for row in plane.tolist() for head in row for x in head]


def rope_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: list[int]
) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]:
    """Twin of `sps2_kernels.rope_append`: q rotated, and by slot the k (rotated) and v that it holds, in fp64.

    Each pair (a, b) is turned as the complex number a + ib times cos + i sin.
    """
    turn = torch.complex(cos.double(), sin.double())[:, None, :]  # [tokens, 1, head_dim / 2]

    def rotate(x: Tensor) -> Tensor:
        first, second = x.double().chunk(2, dim=-1)
        turned = torch.complex(first, second) * turn
        return torch.cat((turned.real, turned.imag), dim=-1)

    rotated = rotate(k)
    held = {slot: (rotated[t], v[t].double()) for t, slot in enumerate(slots) if slot >= 0}
    return rotate(q), held


def csa_mask(
    num_tokens: int,
    shard_tokens: int,
    levels: list[tuple[int, int]],
    kv_head: int,
    layer: int,
    *,
    dense_queries: bool,
    sinks: int,
    tail: int,
) -> Tensor:
    """The definition of CSA (`attention.md`), pair by pair: bool [queries, keys] for one KV head of one layer.

    `levels` are (group in shards, stride), the first (1, 1).
    """
    mask = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for i in range(num_tokens):
        for j in range(i + 1):
            a, b = i // shard_tokens, j // shard_tokens
            visible = a == b or j < sinks or i >= num_tokens - tail
            if not visible:
                level = next((n for n, (group, _) in enumerate(levels) if a // group == b // group), None)
                if level is not None:
                    stride = levels[level][1]
                    offset = (kv_head + layer) % stride
                    visible = j % stride == offset and (dense_queries or i % stride == offset)
            mask[i, j] = visible
    return mask


def csa_mask_of_ranges(
    num_tokens: int,
    shard_tokens: int,
    levels: list[tuple[int, int]],
    kv_head: int,
    layer: int,
    *,
    dense_queries: bool,
    sinks: int,
    tail: int,
) -> Tensor:
    """`csa_mask` for all pairs at once: the same mask in milliseconds, for prompts of thousands of tokens."""
    token = torch.arange(num_tokens)
    i, j = token[:, None], token[None, :]
    shard = token // shard_tokens
    visible = (shard[:, None] == shard[None, :]) | (j < sinks) | (i >= num_tokens - tail)
    seen = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for group, stride in levels:
        inside = (shard // group)[:, None] == (shard // group)[None, :]
        sampled = token % stride == (kv_head + layer) % stride
        both = sampled[None, :] & (sampled[:, None] | dense_queries)
        visible |= inside & ~seen & both
        seen |= inside
    return visible & (j <= i)
