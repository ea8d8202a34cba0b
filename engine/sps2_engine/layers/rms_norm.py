"""Root-mean-square normalisation."""

import torch
from torch import Tensor

from sps2_engine.weights import WeightSource, wide_dtype
from sps2_kernels.row_ops import rms_norm


class RMSNorm:
    """y = x / sqrt(mean(x²) + eps) * w over the last dimension, in fp32 where the model computes in bf16.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """

    def __init__(self, source: WeightSource, name: str, size: int, eps: float) -> None:
        self.weight = torch.empty(size, dtype=wide_dtype(source.dtype), device=source.device)
        self.eps = eps
        source.fill(f"{name}.weight", self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        """Normalises `x` [..., size]; returns a new tensor of its shape, fp32 or wider."""
        return rms_norm(x, self.weight, self.eps)
