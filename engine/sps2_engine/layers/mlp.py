"""The gated feed-forward block."""

from torch import Tensor
from torch.nn import functional

from sps2_engine.layers.linear import Linear
from sps2_engine.weights import WeightSource


class SwiGLU:
    """down(silu(gate(x)) * up(x)).

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """

    def __init__(
        self, source: WeightSource, name: str, hidden_size: int, intermediate_size: int, *, bias: bool
    ) -> None:
        gate_up = {f"{name}.gate_proj": intermediate_size, f"{name}.up_proj": intermediate_size}
        self.gate_up = Linear.load(source, gate_up, hidden_size, bias=bias)
        self.down = Linear.load(source, {f"{name}.down_proj": hidden_size}, intermediate_size, bias=bias)

    @property
    def flops_per_row(self) -> int:
        """FLOPs of one row's products."""
        return self.gate_up.flops_per_row + self.down.flops_per_row

    def add_to(self, out: Tensor, x: Tensor) -> None:
        """Does out [rows, hidden] += SwiGLU(x [rows, hidden]); holds 2 * intermediate_size values per row."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # [rows, intermediate] each
        self.down.add_to(out, functional.silu(gate, inplace=True).mul_(up))
