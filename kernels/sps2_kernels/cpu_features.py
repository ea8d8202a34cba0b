"""What the CPU can do that decides between forms of a kernel."""

import torch


def has_bf16_products() -> bool:
    """Whether matrix products in bf16 are faster than in fp32: AVX512_BF16 or AMX (four to eight times as fast)."""
    return torch.cpu._is_avx512_bf16_supported() or has_tile_products()  # noqa: SLF001 - no public name before torch 2.10


def has_tile_products() -> bool:
    """Whether they are done by AMX, for which torch's own attention packs its operands."""
    return torch.cpu._is_amx_tile_supported()  # noqa: SLF001 - as above
