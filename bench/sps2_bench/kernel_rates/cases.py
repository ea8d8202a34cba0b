"""The kernels that are measured: each with its work, and with what torch offers for the same result.

A new kernel is one more function here.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sps2_bench.kernel_rates.timing import Operation
from sps2_kernels.csa_pack import csa_pack
from sps2_kernels.merge_states import SampledState, merge_sampled, merge_states
from sps2_kernels.paged_decode import PAGE_TOKENS, PagedRows, paged_decode_partial
from sps2_kernels.rope_append import rope_append
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
    yield from (make.causal(), make.dilated(), make.decode())
    yield from (make.merge_sampled(), make.merge_states(), make.pack(), make.rope_append())


class _Maker:
    """Makes the cases of one size; tensors are made once and shared."""

    def __init__(self, device: torch.device, dtype: torch.dtype, size: int, shape: Shape) -> None:
        self._size = size
        self._shape = shape
        self._float32: Callable[..., Tensor] = lambda *sizes: torch.randn(*sizes, device=device)
        self._random: Callable[..., Tensor] = lambda *sizes: self._float32(*sizes).to(dtype)
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

    def decode(self, max_rows: int = 4) -> KernelCase:
        """A batch of queries, each over its own pages of the cache."""
        shape, k, v = self._shape, self._k, self._v
        # Whole pages, as the Triton form wants them.
        per_row = max(1, self._size // max_rows // PAGE_TOKENS) * PAGE_TOKENS
        begins = range(0, min(max_rows, self._size // per_row) * per_row, per_row)
        rows = PagedRows(tuple([(begin, begin + per_row)] for begin in begins), k.device)
        q = self._random(len(rows), shape.num_q_heads, shape.head_dim)
        seen = len(rows) * per_row
        k_rows, v_rows = (
            x[:seen].view(len(rows), per_row, shape.num_kv_heads, -1).transpose(1, 2) for x in (k, v)
        )
        return KernelCase(
            "paged_decode_partial",
            f"{len(rows)} rows",
            self._size,
            4 * shape.head_dim * shape.num_q_heads * seen,
            2 * seen * shape.num_kv_heads * shape.head_dim * k.element_size(),
            lambda: paged_decode_partial(q, k, v, rows, shape.scale),
            lambda: functional.scaled_dot_product_attention(
                q[:, :, None], k_rows, v_rows, scale=shape.scale, enable_gqa=True
            ),
        )

    def merge_sampled(self, stride: int = 8) -> KernelCase:
        """What an exchange returned for sampled queries, into all of them."""
        o, lse = self._q, self._float32(*self._q.shape[:2])
        part_o, part_lse = self._random(*o[::stride].shape), self._float32(*lse[::stride].shape)
        parts = [SampledState(part_o, part_lse, 0, stride, 0)]
        return KernelCase(
            "merge_sampled",
            f"stride {stride}",
            self._size,
            0.0,
            2 * (o.nbytes + lse.nbytes) + part_o.nbytes + part_lse.nbytes,
            lambda: merge_sampled(o, lse, parts),
            None,
        )

    def merge_states(self, num_parts: int = 4) -> KernelCase:
        """Several partial states of the same queries."""
        o = self._random(num_parts, *self._q.shape)
        lse = self._float32(*o.shape[:3])
        return KernelCase(
            "merge_states",
            f"{num_parts} parts",
            self._size,
            0.0,
            (1 + 1 / num_parts) * (o.nbytes + lse.nbytes),
            lambda: merge_states(o, lse),
            None,
        )

    def pack(self, stride: int = 8) -> KernelCase:
        """Sampled rows of every KV head into one send buffer, beside torch's concatenation of the same."""
        planes = [
            x[head % stride :: stride, head : head + 1]
            for head in range(self._shape.num_kv_heads)
            for x in (self._k, self._v)
        ]
        packed = self._k.new_empty(sum(plane.numel() for plane in planes))
        return KernelCase(
            "csa_pack",
            f"stride {stride}",
            self._size,
            0.0,
            2 * packed.nbytes,
            lambda: csa_pack(planes, packed),
            lambda: torch.cat([plane.flatten() for plane in planes], out=packed),
        )

    def rope_append(self) -> KernelCase:
        """Rotation of q and k, and their way into the cache."""
        q, k, v = self._q, self._k, self._v
        angles = self._float32(self._size, self._shape.head_dim // 2)
        cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
        caches = torch.empty_like(k), torch.empty_like(v)
        slots = torch.arange(self._size, device=q.device)
        return KernelCase(
            "rope_append",
            "",
            self._size,
            0.0,
            2 * (q.nbytes + k.nbytes + v.nbytes) + cos.nbytes + sin.nbytes,
            lambda: rope_append(q, k, v, cos, sin, *caches, slots),
            None,
        )


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> Tensor:
    q4, k4, v4 = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, heads, tokens, head_dim]
    return functional.scaled_dot_product_attention(q4, k4, v4, is_causal=causal, scale=scale, enable_gqa=True)
