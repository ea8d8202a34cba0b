"""Matrix products with weights."""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from sps2_engine.weights import WeightSource


class Linear:
    """y = x Wᵀ + b, with W [out_features, in_features]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    @classmethod
    def load(cls, source: WeightSource, parts: Mapping[str, int], in_features: int, *, bias: bool) -> Self:
        """Reads one or several matrices from a checkpoint.

        Matrices that read the same input (q, k, v; gate, up) are stacked by rows into one W: one kernel
        launch instead of several, which is most of the cost when a decode step has few rows.

        Args:
            source: where the tensors come from.
            parts: output size by checkpoint name (`...q_proj`), in the order their outputs are laid out.
            in_features: columns of every part.
            bias: whether the parts have a bias.
        """
        sizes = list(parts.values())
        linear = cls(torch.empty(sum(sizes), in_features, dtype=source.dtype, device=source.device))
        for name, weight in zip(parts, torch.split(linear.weight, sizes), strict=True):
            source.fill(f"{name}.weight", weight)
        if bias:
            linear.bias = torch.empty(sum(sizes), dtype=source.dtype, device=source.device)
            for name, part in zip(parts, torch.split(linear.bias, sizes), strict=True):
                source.fill(f"{name}.bias", part)
        return linear

    @property
    def flops_per_row(self) -> int:
        """FLOPs of one row's product."""
        return 2 * self.weight.numel()

    def __call__(self, x: Tensor) -> Tensor:
        """Takes x [rows, in_features] to [rows, out_features] in the weight's dtype, to which x is converted."""
        return functional.linear(x.to(self.weight.dtype), self.weight, self.bias)

    def add_to(self, out: Tensor, x: Tensor) -> None:
        """Does out [rows, out_features] += x [rows, in_features] Wᵀ + b, in the wider of their dtypes.

        The product needs no temporary where out has the weight's dtype.
        """
        if out.dtype != self.weight.dtype:
            out.add_(self(x))
            return
        out.addmm_(x, self.weight.T)
        if self.bias is not None:
            out.add_(self.bias)
