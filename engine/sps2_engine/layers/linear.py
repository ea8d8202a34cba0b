"""Matrix products with weights."""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from sps2_engine.layers.tensor_ranks import ALONE, TensorRanks
from sps2_engine.mesh import Part
from sps2_engine.weights import WeightSource
from sps2_kernels.few_rows import FewRows


class Linear:
    """y = x Wᵀ + b, with W [out_features, in_features], or with what a tensor rank holds of it.

    A part of the rows makes a part of y out of all of x ("column parallel": Wᵀ is cut by columns). A part of the
    columns makes a summand of y out of a part of x ("row parallel"): `add_to` sums it over the tensor ranks.
    Source: Shoeybi et al., "Megatron-LM", 2019.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self._few_rows: FewRows | None = None

    @classmethod
    def load(cls, source: WeightSource, parts: Mapping[str, Part], in_features: Part, *, bias: bool) -> Self:
        """Reads one or several matrices from a checkpoint.

        Matrices that read the same input (q, k, v; gate, up) are stacked by rows into one W: one kernel
        launch instead of several, which is most of the cost when a decode step has few rows.

        Args:
            source: where the tensors come from.
            parts: rows of W by checkpoint name (`...q_proj`), in the order their outputs are laid out.
            in_features: columns of every matrix; either these or the rows are all there are.
            bias: whether the matrices have a bias.
        """
        sizes = [len(part) for part in parts.values()]
        linear = cls(torch.empty(sum(sizes), len(in_features), dtype=source.dtype, device=source.device))
        for (name, rows), weight in zip(parts.items(), torch.split(linear.weight, sizes), strict=True):
            if in_features.is_all:
                source.fill(f"{name}.weight", weight, rows)
            else:
                source.fill(f"{name}.weight", weight, in_features, dim=1)
        if bias:
            linear.bias = torch.empty(sum(sizes), dtype=source.dtype, device=source.device)
            for (name, rows), values in zip(parts.items(), torch.split(linear.bias, sizes), strict=True):
                source.fill(f"{name}.bias", values, rows)
        return linear

    @property
    def flops_per_row(self) -> int:
        """FLOPs of one row's product."""
        return 2 * self.weight.numel()

    def __call__(self, x: Tensor) -> Tensor:
        """Takes x [rows, in_features] to [rows, out_features] in the weight's dtype, to which x is converted."""
        return self._product(x.to(self.weight.dtype), self.bias)

    def add_to(self, out: Tensor, x: Tensor, ranks: TensorRanks = ALONE) -> None:
        """Does out [rows, out_features] += x [rows, in_features] Wᵀ + b, in the wider of their dtypes.

        The product needs no temporary where out has the weight's dtype and W all its columns.
        """
        if ranks.size > 1:
            product = self._product(x.to(self.weight.dtype)).to(out.dtype)
            ranks.sum(product)
            out.add_(product)
        elif out.dtype != self.weight.dtype:
            out.add_(self(x))
            return
        elif self._few_rows is not None and self._few_rows.suits(x):
            out.add_(self._few_rows(x))
        else:
            out.addmm_(x, self.weight.T)
        if self.bias is not None:  # once, after the sum
            out.add_(self.bias)

    def pack(self) -> None:
        """Makes the form for few rows, where there is one; takes as much memory again. For ranks that decode."""
        self._few_rows = FewRows.of(self.weight)

    def _product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X Wᵀ + b, with x in the weight's dtype."""
        if self._few_rows is None or not self._few_rows.suits(x):
            return functional.linear(x, self.weight, bias)
        y = self._few_rows(x)
        return y if bias is None else y.add_(bias)
