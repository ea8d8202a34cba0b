"""Matrix products with weights."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from sps2_engine.weights import WeightSource


class Linear:
    """y = x Wᵀ + b.

    Matrices that read the same input (q, k, v; gate, up) are stacked by rows into one W: one kernel launch
    instead of several, which is most of the cost when a decode step has few rows.

    Args:
        source: where the tensors come from.
        parts: output size by checkpoint name (`...q_proj`), in the order their outputs are laid out.
        in_features: columns of every part.
        bias: whether the parts have a bias.
    """

    def __init__(
        self, source: WeightSource, parts: Mapping[str, int], in_features: int, *, bias: bool
    ) -> None:
        out_features = sum(parts.values())
        self.weight = torch.empty(out_features, in_features, dtype=source.dtype, device=source.device)
        self.bias = torch.empty(out_features, dtype=source.dtype, device=source.device) if bias else None
        sizes = list(parts.values())
        for name, weight in zip(parts, torch.split(self.weight, sizes), strict=True):
            source.fill(f"{name}.weight", weight)
        if self.bias is not None:
            for name, part in zip(parts, torch.split(self.bias, sizes), strict=True):
                source.fill(f"{name}.bias", part)

    def __call__(self, x: Tensor) -> Tensor:
        """Takes x [rows, in_features] to [rows, out_features]."""
        return functional.linear(x, self.weight, self.bias)

    def add_to(self, out: Tensor, x: Tensor) -> None:
        """Does out [rows, out_features] += x [rows, in_features] Wᵀ + b; the product needs no temporary."""
        out.addmm_(x, self.weight.T)
        if self.bias is not None:
            out.add_(self.bias)
