"""What a rank is taken to compute and to send each second, where schedules are weighed against each other. Pure.

Documented constants, not measurements: a rank that measured itself on a busy machine would have its group choose
otherwise than on an idle one, and the same prompt would then be rounded in two ways.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Rates:
    """One rank's."""

    flops_per_s: float
    """Attention, of one rank while the others are busy too."""
    bytes_per_s: float
    """Sent by one rank while all exchange."""
    latency_s: float = 3e-4
    """Of one exchange, however small; as measured over Gloo."""

    def __post_init__(self) -> None:
        if min(self.flops_per_s, self.bytes_per_s) <= 0 or self.latency_s < 0:
            raise ValueError(f"not rates: {self}")


CPU_CORE = Rates(flops_per_s=75e9, bytes_per_s=1.5e9)
"""One core in fp32 with Gloo over loopback, as measured."""
CPU_CORE_BF16 = replace(CPU_CORE, flops_per_s=157e9)
"""The same by tiled bf16 attention."""
H200 = Rates(flops_per_s=430e12, bytes_per_s=200e9, latency_s=3e-5)
"""bf16 at 55% of the measured GEMM rate; NVLink at less than half of its nominal 450 GB/s each way, not measured."""


def assumed_rates(device: str, dtype: str, threads: int) -> Rates:
    """The rates of a rank.

    Args:
        device: "cpu" or "cuda".
        dtype: "fp32" or "bf16".
        threads: of one operator, on a CPU.
    """
    if device == "cuda":
        return H200
    core = CPU_CORE_BF16 if dtype == "bf16" else CPU_CORE
    return replace(core, flops_per_s=core.flops_per_s * threads)
