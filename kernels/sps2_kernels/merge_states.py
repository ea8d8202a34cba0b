"""Merges partial attention states of the same queries over disjoint keys."""

import torch
from torch import Tensor


def merge_states(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """o = sum_n exp(lse_n - lse) o_n with lse = log sum_n exp(lse_n), in fp32; mutates no input.

    Args:
        o: [parts, tokens, heads, head_dim].
        lse: [parts, tokens, heads] fp32, natural log; -inf marks a part in which the query saw nothing.

    Returns:
        o [tokens, heads, head_dim] in o's dtype, lse [tokens, heads] fp32.
    """
    top = lse.amax(dim=0)
    # Where every part is empty there is no maximum to subtract: exp(-inf - 0) is the 0 that is wanted.
    weights = torch.exp(lse - top.masked_fill(top.isneginf(), 0.0))  # [parts, tokens, heads]
    total = weights.sum(dim=0)
    mixed = (weights.unsqueeze(-1) * o.float()).sum(dim=0)  # [tokens, heads, head_dim]
    safe_total = total.masked_fill(total == 0, 1.0)
    return (mixed / safe_total.unsqueeze(-1)).to(o.dtype), top + torch.log(total)


def merge_pair(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """`merge_states` of two parts without stacking them: o [tokens, heads, head_dim], lse [tokens, heads].

    Weights are divided by their sum: taken from the merged log-sum-exp they would miss 1 by its rounding, which is
    1e-3 where scores are 1e4.
    """
    top = torch.maximum(lse_a, lse_b)
    base = top.masked_fill(top.isneginf(), 0.0)
    weight_a, weight_b = torch.exp(lse_a - base), torch.exp(lse_b - base)
    total = weight_a + weight_b
    share = (weight_b / total.masked_fill(total == 0, 1.0)).unsqueeze(-1)
    return torch.lerp(o_a.float(), o_b.float(), share).to(o_a.dtype), base + torch.log(total)
