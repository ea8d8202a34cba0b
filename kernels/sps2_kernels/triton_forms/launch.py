"""What the Triton forms share: a typed `jit`, the key that a kernel is compiled under, and tables on the device."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
import triton
from torch import Tensor

LOG2_E = 1.4426950408889634
TYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32"}
"""Triton's names of the element types that the kernels take."""


class Kernel(Protocol):
    """A function that triton compiles: `kernel[grid](*args)` launches it, a call inside a kernel inlines it."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        """The launcher over a grid."""
        ...

    def __call__(self, *args: Any) -> Any:
        """The call from another kernel."""
        ...


def jit(*, unspecialized: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Kernel]:
    """`triton.jit`, with a type.

    Args:
        unspecialized: integers that change from call to call; without this triton compiles again when one of them
            happens to be 1 or a multiple of 16, in the middle of serving.
    """
    return cast("Callable[[Callable[..., Any]], Kernel]", triton.jit(do_not_specialize=list(unspecialized)))


@dataclass(frozen=True)
class Tiles:
    """Static configuration of one kernel for one shape.

    In place of autotuning, whose choice would differ from run to run and cost seconds at start.
    """

    block_m: int
    """Rows of queries (or tokens, or lines) of one program."""
    block_n: int
    """Keys of one step of its loop; 1 where there is no loop over keys."""
    num_warps: int
    num_stages: int = 1
    """Depth of the software pipeline of loads."""
    precision: str = "tf32x3"
    """How fp32 products are formed: "tf32x3" on the tensor cores, 1e-6 from exact; "ieee" without them. bf16 ones do
    not care."""


@dataclass(frozen=True)
class KernelKey:
    """One specialisation of a kernel: all that the compiler needs to know."""

    name: str
    """Family and what distinguishes the key, e.g. `segment_attention bf16 d128`."""
    kernel: Kernel
    signature: Mapping[str, str]
    """Type of each run-time argument, in triton's notation ("*bf16", "i32", "fp32")."""
    constants: Mapping[str, object]
    """Value of each compile-time argument."""
    tiles: Tiles
    aligned: frozenset[str] = field(default_factory=frozenset)
    """Arguments known to be multiples of 16: addresses in bytes, strides in elements."""


def next_power_of_2(value: int) -> int:
    """The least power of two >= value."""
    return 1 << (value - 1).bit_length()


def interpreted(x: Tensor) -> bool:
    """Whether a kernel on this tensor runs in the interpreter, whose bf16 arithmetic is wrong: load to fp32 there."""
    return not x.is_cuda


def device_table(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """A table of numbers for a kernel, int64 [rows, columns]; copied without waiting for the device."""
    on_gpu = device.type == "cuda"
    return torch.tensor(rows, dtype=torch.int64, pin_memory=on_gpu).to(device, non_blocking=on_gpu)
