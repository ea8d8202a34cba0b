"""Tensors far larger than memory, of which no page exists but those that are touched."""

import mmap

import torch
from torch import Tensor

MAP_NORESERVE = 0x4000
"""Linux: address space that counts against no limit; Python's mmap does not name it."""


def vast(num_elements: int, dtype: torch.dtype) -> Tensor:
    """Zeros [num_elements] in address space alone."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, num_elements * dtype.itemsize, flags=flags), dtype=dtype)
