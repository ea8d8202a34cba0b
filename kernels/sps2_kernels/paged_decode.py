"""Attention of single queries over paged KV: the kernel of decode.

Knows nothing of ranks or requests; a row is a query with a list of runs of cache slots.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sps2_kernels.merge_states import merge_states
from sps2_kernels.segment_attention import UNMASKED, segment_attention

SlotRuns = Sequence[tuple[int, int]]
"""Runs [begin, end) of cache slots that hold a row's keys, in any order; empty runs are not allowed."""


def paged_decode_partial(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Sequence[SlotRuns], scale: float
) -> tuple[Tensor, Tensor]:
    """Partial attention of each row's query over the keys that lie in this rank's cache.

    Args:
        q: [rows, q_heads, head_dim].
        k_cache, v_cache: [slots, kv_heads, head_dim], one layer of the arena.
        rows: for each row the runs of slots that it sees; none is legal (kv_len 0).
        scale: factor on the scores.

    Returns:
        o [rows, q_heads, head_dim] in q's dtype and lse [rows, q_heads] fp32; a row without keys has
        o = 0, lse = -inf.
    """
    o = torch.zeros_like(q)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=torch.float32, device=q.device)
    for row, runs in enumerate(rows):
        if runs:
            o[row], lse[row] = _attend_row(q[row], k_cache, v_cache, runs, scale)
    return o, lse


def _attend_row(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, runs: SlotRuns, scale: float
) -> tuple[Tensor, Tensor]:
    """One query [q_heads, head_dim] over its runs. The query heads of a KV head are folded into rows, so that
    each key and value is read once for all of them, and a run is a view: nothing is gathered."""
    num_q_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    folded = q.view(num_kv_heads, num_q_heads // num_kv_heads, head_dim).transpose(0, 1)  # [fold, kv_heads, d]
    parts = [
        segment_attention(folded, k_cache[begin:end], v_cache[begin:end], UNMASKED, scale) for begin, end in runs
    ]
    if len(parts) == 1:
        o, lse = parts[0]
    else:
        o, lse = merge_states(torch.stack([o for o, _ in parts]), torch.stack([lse for _, lse in parts]))
    return o.transpose(0, 1).reshape(num_q_heads, head_dim), lse.transpose(0, 1).reshape(num_q_heads)

