"""What the CPU can do that decides between forms of a kernel."""

import torch


def has_bf16_products() -> bool:
    """Whether matrix products in bf16 are faster than in fp32: AVX512_BF16 or AMX (about four times as fast)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # noqa: SLF001 - no public name before torch 2.10
