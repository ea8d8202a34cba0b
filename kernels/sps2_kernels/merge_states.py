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
    """`merge_states` of two parts without stacking them: o [tokens, heads, head_dim], lse [tokens, heads]."""
    lse = torch.logaddexp(lse_a, lse_b)
    base = lse.masked_fill(lse.isneginf(), 0.0)
    weight_a = torch.exp(lse_a - base).unsqueeze(-1)
    weight_b = torch.exp(lse_b - base).unsqueeze(-1)
    return (o_a.float().mul(weight_a)).addcmul_(o_b.float(), weight_b).to(o_a.dtype), lse
