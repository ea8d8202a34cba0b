"""Root-mean-square normalisation."""

import torch
from torch import Tensor
from torch.nn import functional

from sps2_engine.weights import WeightSource


class RMSNorm:
    """y = x / sqrt(mean(x²) + eps) * w over the last dimension, computed in fp32 for narrower dtypes.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """

    def __init__(self, source: WeightSource, name: str, size: int, eps: float) -> None:
        self.weight = torch.empty(size, dtype=source.dtype, device=source.device)
        self.eps = eps
        source.fill(f"{name}.weight", self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        """Normalises `x` [..., size]; returns a new tensor of its shape and dtype."""
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
