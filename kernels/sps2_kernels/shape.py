"""What of a model decides which kernels it needs. Knows neither triton nor checkpoints."""

from dataclasses import dataclass

import torch

HEAD_DIMS = (32, 64, 96, 128, 256)
"""Head sizes that the Triton forms have configurations for."""


@dataclass(frozen=True)
class KernelShape:
    """The attention shape of a model on one rank."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    """fp32 or bf16, of q, k, v, o and of the KV cache."""

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_q_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_kv_heads} KV heads do not divide {self.num_q_heads} query heads")

    @property
    def fold(self) -> int:
        """Query heads to a KV head."""
        return self.num_q_heads // self.num_kv_heads
