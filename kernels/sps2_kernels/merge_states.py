"""Merges partial attention states of the same queries over disjoint keys.

A state is an output o and its natural log-sum-exp; -inf marks a part in which the query saw nothing. Weights are
divided by their sum, in fp32: taken from the merged log-sum-exp they would miss 1 by its rounding, which is 1e-3
where scores are 1e4.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def merge_states(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """O = sum_n exp(lse_n - lse) o_n with lse = log sum_n exp(lse_n), in fp32; mutates no input.

    CUDA tensors go to the Triton form, all others to the CPU form.

    Args:
        o: [parts, tokens, heads, head_dim], each head contiguous.
        lse: [parts, tokens, heads] fp32.

    Returns:
        o [tokens, heads, head_dim] in o's dtype, lse [tokens, heads] fp32.
    """
    if o.is_cuda:
        from sps2_kernels.triton_forms import merge_states as form  # noqa: PLC0415 - see there

        return form.merge_states(o, lse)
    return merge_states_cpu(o, lse)


def merge_states_cpu(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """CPU form of `merge_states`."""
    top = lse.amax(dim=0)
    # Where every part is empty there is no maximum to subtract: exp(-inf - 0) is the 0 that is wanted.
    weights = torch.exp(lse - top.masked_fill(top.isneginf(), 0.0))  # [parts, tokens, heads]
    total = weights.sum(dim=0)
    mixed = (weights.unsqueeze(-1) * o.float()).sum(dim=0)  # [tokens, heads, head_dim]
    safe_total = total.masked_fill(total == 0, 1.0)
    return (mixed / safe_total.unsqueeze(-1)).to(o.dtype), top + torch.log(total)


def merge_pair(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """`merge_states` of two parts without stacking them: o [tokens, heads, head_dim], lse [tokens, heads]."""
    o, lse = o_a.clone(), lse_a.clone()
    merge_into(o, lse, o_b, lse_b)
    return o, lse


def merge_into(o: Tensor, lse: Tensor, part_o: Tensor, part_lse: Tensor) -> None:
    """Merges a part into a state in place: `merge_states` of the two; the first may be a view of any strides.

    o += w (part_o - o), w = e^part_lse / (e^lse + e^part_lse) = sigmoid(part_lse - lse): so the weights sum to
    one. Taken from the merged log-sum-exp they would miss it by its rounding, 1e-3 where scores are 1e4.

    Args:
        o: [tokens, heads, head_dim], changed.
        lse: [tokens, heads] fp32, changed.
        part_o: like o, not changed.
        part_lse: like lse, not changed.
    """
    # -inf - -inf: neither has seen anything, and o is 0 either way.
    weight = torch.sigmoid(part_lse - lse).nan_to_num_(0.0).unsqueeze(-1)
    if o.dtype == torch.float32:
        o.lerp_(part_o.float(), weight)
    else:
        o.copy_(torch.lerp(o.float(), part_o.float(), weight))
    torch.logaddexp(lse, part_lse, out=lse)


@dataclass(frozen=True)
class SampledState:
    """A state of some rows and heads only: what an exchange returns for a sample of the queries."""

    o: Tensor
    """[rows, heads, head_dim], each head contiguous; usually a plane of a receive buffer."""
    lse: Tensor
    """[rows, heads] fp32."""
    first_row: int
    """Token of row 0; row n is token first_row + n * stride."""
    stride: int
    first_head: int
    """Head 0 of the part among all heads."""

    def __post_init__(self) -> None:
        if self.o.shape[:2] != self.lse.shape or self.stride < 1 or min(self.first_row, self.first_head) < 0:
            raise ValueError(
                f"not a sampled state: o {self.o.shape}, lse {self.lse.shape}, rows {self.first_row} by "
                f"{self.stride}, heads from {self.first_head}"
            )

    @property
    def place(self) -> tuple[slice, slice]:
        """Rows and heads of the whole that it is of, as an index."""
        end = self.first_row + len(self.o) * self.stride
        return slice(self.first_row, end, self.stride), slice(
            self.first_head, self.first_head + self.o.shape[1]
        )


def merge_sampled(o: Tensor, lse: Tensor, parts: Sequence[SampledState]) -> tuple[Tensor, Tensor]:
    """Merges sampled states into the rows and heads that they are of; reads them where they lie, mutates no input.

    CUDA tensors go to the Triton form, all others to the CPU form.

    Args:
        o: [tokens, heads, head_dim], the state of every row, each head contiguous.
        lse: [tokens, heads] fp32.
        parts: in o's dtype; they may overlap, and their order changes rounding only.

    Returns:
        o [tokens, heads, head_dim] in o's dtype, rounded once, and lse [tokens, heads] fp32.

    Raises:
        ValueError: a part reaches beyond the tokens or heads.
    """
    for part in parts:
        rows, heads = part.place
        # The last row's token, not the slice's end: a stride may reach past the last token.
        if rows.stop - rows.step >= len(o) or heads.stop > o.shape[1]:
            raise ValueError(f"rows {rows} and heads {heads} lie outside of {tuple(o.shape)}")
    if o.is_cuda:
        from sps2_kernels.triton_forms import merge_sampled as form  # noqa: PLC0415 - see there

        return form.merge_sampled(o, lse, parts)
    return merge_sampled_cpu(o, lse, parts)


def merge_sampled_cpu(o: Tensor, lse: Tensor, parts: Sequence[SampledState]) -> tuple[Tensor, Tensor]:
    """CPU form of `merge_sampled`: one part after the other, through strided views."""
    merged, merged_lse = o.to(torch.float32, copy=True), lse.clone()
    for part in parts:
        place = part.place
        merge_into(merged[place], merged_lse[place], part.o, part.lse)
    return merged.to(o.dtype), merged_lse
