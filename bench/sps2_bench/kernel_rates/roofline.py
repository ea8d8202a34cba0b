"""What this machine can do at best: measured, not looked up."""

from dataclasses import dataclass

import torch

from sps2_bench.kernel_rates.timing import seconds

GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}
"""Far beyond any cache."""


@dataclass(frozen=True)
class Roofline:
    """Limits of a device for one dtype."""

    flops_per_s: float
    """Of a large square matrix product."""
    bytes_per_s: float
    """Of a large copy, read and written bytes together."""

    def seconds(self, flops: float, moved: float) -> float:
        """The least time for so much work, compute and memory overlapping."""
        return max(flops / self.flops_per_s, moved / self.bytes_per_s)


def measure_roofline(device: torch.device, dtype: torch.dtype, repeats: int, budget_s: float) -> Roofline:
    """Measures both limits."""
    size = GEMM_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(COPY_BYTES[device.type] // 2, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    gemm_s = seconds(lambda: a @ b, device, repeats, budget_s)
    copy_s = seconds(lambda: target.copy_(source), device, repeats, budget_s)
    return Roofline(2 * size**3 / gemm_s, 2 * source.nbytes / copy_s)
