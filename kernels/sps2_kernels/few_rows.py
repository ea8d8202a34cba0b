"""Products of a few rows with a matrix of weights on a CPU: a decode step's.

What such a product costs is reading the weights. One row reads them as fast as memory allows with torch's own product;
4 to 8 rows at half of that or less, since MKL then packs the weights on every call. Here they are packed once.
"""

from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

MOST_ROWS = 8
"""What weights are packed for: MKL's packed form serves one number of rows, and fewer are filled up with zeros."""
LEAST_ROWS = 5
"""Fewer cost as much as 8 by the packed form, which is no less than by torch's own product."""


class FewRows:
    """y = x Wᵀ of 5 to 8 rows, in fp32. Holds a second copy of W, since other numbers of rows need the first."""

    def __init__(self, weight: Tensor) -> None:
        """Packs `weight` [out_features, in_features], fp32, contiguous; it must not change any more."""
        self._weight = weight
        self._packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, MOST_ROWS)  # noqa: SLF001 - no public name

    @classmethod
    def of(cls, weight: Tensor) -> Self | None:
        """The packed form of `weight`, None where there is none: it is for fp32 on a CPU, by a torch with MKL."""
        has_mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
        suits = has_mkl and weight.dtype == torch.float32 and weight.device.type == "cpu"
        return cls(weight) if suits else None

    def suits(self, x: Tensor) -> bool:
        """Whether x [rows, in_features] is what the packed form is for."""
        return LEAST_ROWS <= len(x) <= MOST_ROWS

    def __call__(self, x: Tensor) -> Tensor:
        """Takes x [at most 8 rows, in_features] to [rows, out_features]."""
        filled = functional.pad(x, (0, 0, 0, MOST_ROWS - len(x))) if len(x) < MOST_ROWS else x
        y: Tensor = torch.ops.mkl._mkl_linear(filled, self._packed, self._weight, None, MOST_ROWS)  # noqa: SLF001
        return y[: len(x)]
