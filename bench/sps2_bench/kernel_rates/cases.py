"""The kernels that are measured: each with its work, and with what torch offers for the same result.

A new kernel is one more function here.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sps2_bench.kernel_rates.timing import Operation
from sps2_kernels.merge_states import merge_pair, merge_states
from sps2_kernels.paged_decode import paged_decode_partial
from sps2_kernels.segment_attention import UNMASKED, segment_attention


@dataclass(frozen=True)
class Shape:
    """Heads of the measured attention."""

    num_q_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64

    @property
    def scale(self) -> float:
        """Factor on the scores."""
        return float(self.head_dim**-0.5)


@dataclass(frozen=True)
class KernelCase:
    """One kernel at one size."""

    kernel: str
    form: str
    """Which of its forms or uses."""
    size: int
    """Tokens (or rows)."""
    flops: float
    moved: float
    """Bytes that must be read and written at least."""
    run: Operation
    torch_best: Operation | None
    """The same result by torch alone."""


def list_kernels(device: torch.device, dtype: torch.dtype, size: int, shape: Shape) -> Iterator[KernelCase]:
    """Every kernel at one size on a device."""
    make = _Maker(device, dtype, size, shape)
    yield from (make.causal(), make.dilated(), make.decode(), make.merge_pair(), make.merge_states())


class _Maker:
    """Makes the cases of one size; tensors are made once and shared."""

    def __init__(self, device: torch.device, dtype: torch.dtype, size: int, shape: Shape) -> None:
        self._size = size
        self._shape = shape
        self._random: Callable[..., Tensor] = lambda *sizes: torch.randn(*sizes, device=device).to(dtype)
        self._q = self._random(size, shape.num_q_heads, shape.head_dim)
        self._k = self._random(size, shape.num_kv_heads, shape.head_dim)
        self._v = self._random(size, shape.num_kv_heads, shape.head_dim)

    def causal(self) -> KernelCase:
        """A shard by itself."""
        q, k, v, shape = self._q, self._k, self._v, self._shape
        pairs = self._size * (self._size + 1) / 2
        return KernelCase(
            "segment_attention",
            "causal",
            self._size,
            4 * shape.head_dim * shape.num_q_heads * pairs,
            2 * q.nbytes + k.nbytes + v.nbytes,
            lambda: segment_attention(q, k, v, 0, shape.scale),
            lambda: _sdpa(q, k, v, shape.scale, causal=True),
        )

    def dilated(self, stride: int = 8) -> KernelCase:
        """Sampled keys of one KV head, strided in place: what a level computes."""
        shape = self._shape
        fold = shape.num_q_heads // shape.num_kv_heads
        q, k, v = self._q[:, :fold], self._k[::stride, :1], self._v[::stride, :1]
        return KernelCase(
            "segment_attention",
            f"keys of stride {stride}",
            self._size,
            4 * shape.head_dim * fold * self._size * len(k),
            2 * q.nbytes + k.nbytes + v.nbytes,
            lambda: segment_attention(q, k, v, UNMASKED, shape.scale),
            lambda: _sdpa(q, k.contiguous(), v.contiguous(), shape.scale, causal=False),
        )

    def decode(self, rows: int = 4) -> KernelCase:
        """A batch of queries, each over its own run of a paged cache."""
        shape, per_row = self._shape, max(1, self._size // rows)
        q, k, v = self._random(rows, shape.num_q_heads, shape.head_dim), self._k, self._v
        runs = [
            [(row * per_row, (row + 1) * per_row)] for row in range(rows) if (row + 1) * per_row <= self._size
        ]
        q = q[: len(runs)]
        seen = len(runs) * per_row
        batched = (x[:seen].view(len(runs), per_row, shape.num_kv_heads, -1).transpose(1, 2) for x in (k, v))
        k_rows, v_rows = batched
        return KernelCase(
            "paged_decode_partial",
            f"{len(runs)} rows",
            self._size,
            4 * shape.head_dim * shape.num_q_heads * seen,
            2 * seen * shape.num_kv_heads * shape.head_dim * k.element_size(),
            lambda: paged_decode_partial(q, k, v, runs, shape.scale),
            lambda: functional.scaled_dot_product_attention(
                q[:, :, None], k_rows, v_rows, scale=shape.scale, enable_gqa=True
            ),
        )

    def merge_pair(self) -> KernelCase:
        """Two partial states of the same queries."""
        a, b = self._q, self._random(*self._q.shape)
        lse_a, lse_b = (torch.randn(a.shape[:2], device=a.device) for _ in range(2))
        return KernelCase(
            "merge_pair", "", self._size, 0.0, 3 * (a.nbytes + lse_a.nbytes),
            lambda: merge_pair(a, lse_a, b, lse_b), None,
        )  # fmt: skip

    def merge_states(self, parts: int = 4) -> KernelCase:
        """Several partial states of the same queries."""
        o = self._random(parts, *self._q.shape)
        lse = torch.randn(o.shape[:3], device=o.device)
        return KernelCase(
            "merge_states", f"{parts} parts", self._size, 0.0, (1 + 1 / parts) * (o.nbytes + lse.nbytes),
            lambda: merge_states(o, lse), None,
        )  # fmt: skip


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> Tensor:
    q4, k4, v4 = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, heads, tokens, head_dim]
    return functional.scaled_dot_product_attention(q4, k4, v4, is_causal=causal, scale=scale, enable_gqa=True)
