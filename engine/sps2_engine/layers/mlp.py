"""The gated feed-forward block."""

from torch import Tensor

from sps2_engine.layers.linear import Linear
from sps2_engine.layers.tensor_ranks import TensorRanks
from sps2_engine.mesh import Part
from sps2_engine.weights import WeightSource
from sps2_kernels.row_ops import swiglu


class SwiGLU:
    """down(silu(gate(x)) * up(x)), of all columns between them or of a tensor rank's.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """

    def __init__(
        self, source: WeightSource, name: str, hidden_size: int, intermediate: Part, *, bias: bool
    ) -> None:
        hidden = Part.all(hidden_size)
        gate_up = {f"{name}.gate_proj": intermediate, f"{name}.up_proj": intermediate}
        self.gate_up = Linear.load(source, gate_up, hidden, bias=bias)
        self.down = Linear.load(source, {f"{name}.down_proj": hidden}, intermediate, bias=bias)

    @property
    def flops_per_row(self) -> int:
        """FLOPs of one row's products."""
        return self.gate_up.flops_per_row + self.down.flops_per_row

    def add_to(self, out: Tensor, x: Tensor, ranks: TensorRanks) -> None:
        """Does out [rows, hidden] += SwiGLU(x [rows, hidden]); holds 2 values per row and own column between."""
        self.down.add_to(out, swiglu(self.gate_up(x)), ranks)

    def pack(self) -> None:
        """See `Linear.pack`."""
        self.gate_up.pack()
        self.down.pack()
