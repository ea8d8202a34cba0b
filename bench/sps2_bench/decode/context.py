"""The context that every program decodes after: random KV, the same for the same row, layer and length.

No prefill made it. Rows and layers read overlapping windows of one drawn tensor, so that filling costs a copy.
"""

import torch
from torch import Tensor

from sps2_engine.models import ModelConfig


class Context:
    """KV of a batch of rows."""

    def __init__(self, config: ModelConfig, num_tokens: int, batch: int) -> None:
        self.num_tokens = num_tokens
        self._num_layers = config.num_layers
        generator = torch.Generator().manual_seed(num_tokens)
        windows = batch * config.num_layers
        shape = (2, num_tokens + windows, config.num_kv_heads, config.head_dim)
        self._drawn = torch.randn(shape, generator=generator)

    def kv(self, row: int, layer: int) -> Tensor:
        """[2, tokens, kv_heads, head_dim], k then v, k as if rotated."""
        first = row * self._num_layers + layer
        return self._drawn[:, first : first + self.num_tokens]


def first_token(row: int, vocab_size: int) -> int:
    """What a row takes in at its first step."""
    return (7 * row + 1) % vocab_size
