"""The small operators of a decoder layer: norms, rotation, the gate of the feed-forward block.

Each in one call: on a CPU that takes fp32 and has a compiler by `native/row_ops.c`, else by torch's operators. Weights
that pass through the caches leave nothing of torch in them, so each of its calls takes 30 to 40 us in a decode step.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from sps2_kernels.native_build import load_native

SOURCE = Path(__file__).parent / "native" / "row_ops.c"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """X / sqrt(mean(x²) + eps) * weight over the last dimension, in the weight's dtype; a new tensor.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.

    Args:
        x: [tokens, size] or [tokens, heads, size].
        weight: [size], contiguous, in fp32 or wider.
        eps: keeps rows of zeros finite.
    """
    x = x.to(weight.dtype)
    library = _library_for(x)
    if library is None:
        # Torch's rms_norm is composed of whole temporaries on a CPU: 5 times slower on thousands of rows.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return torch.mul(x, weight).mul_(norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_())
    heads = x.shape[1] if x.dim() > 2 else 1
    y = torch.empty(x.shape, dtype=x.dtype)
    library.rows_norm(
        x.data_ptr(),
        x.stride(0),
        x.stride(-2),
        weight.data_ptr(),
        eps,
        len(x),
        heads,
        x.shape[-1],
        torch.get_num_threads(),
        y.data_ptr(),
    )
    return y


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Writes (a cos - b sin, b cos + a sin) into out, with a and b the halves of each head of x.

    Source: Su et al., "RoFormer", 2021, in the half-split layout of the published checkpoints.

    Args:
        x: [tokens, heads, head_dim], rounded once where it is narrower than the angles.
        cos: [tokens, 1, head_dim], the two halves equal, in fp32 or wider.
        sin: [tokens, 1, head_dim / 2], likewise.
        out: as x, and not x.
    """
    library = _library_for(x, out, cos, sin)
    if library is None:
        _rotate_by_torch(x, cos, sin, out)
        return
    tokens, heads, size = x.shape
    library.rows_rotate(
        x.data_ptr(),
        x.stride(0),
        x.stride(1),
        cos.data_ptr(),
        cos.stride(0),
        sin.data_ptr(),
        sin.stride(0),
        tokens,
        heads,
        size // 2,
        torch.get_num_threads(),
        out.data_ptr(),
        out.stride(0),
        out.stride(1),
    )


def split_rotated(qkv: Tensor, cos: Tensor, sin: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Takes a projection apart: q and k rotated as by `rotate`, v as it is.

    Args:
        qkv: [tokens, (q_heads + 2 kv_heads) head_dim], contiguous.
        cos, sin: as for `rotate`.
        q: [tokens, q_heads, head_dim], contiguous, written, in qkv's dtype.
        k, v: [tokens, kv_heads, head_dim], likewise.
    """
    library = _library_for(qkv, cos, sin)
    if library is None:
        heads = [q.shape[1], k.shape[1], v.shape[1]]
        new_q, new_k, new_v = torch.split(qkv.view(len(qkv), sum(heads), q.shape[2]), heads, dim=1)
        rotate(new_q, cos, sin, q)
        rotate(new_k, cos, sin, k)
        v.copy_(new_v)
        return
    library.rows_split(
        qkv.data_ptr(),
        cos.data_ptr(),
        cos.stride(0),
        sin.data_ptr(),
        sin.stride(0),
        len(qkv),
        q.shape[1],
        k.shape[1],
        q.shape[2] // 2,
        torch.get_num_threads(),
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
    )


def append_rows(k: Tensor, v: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """Puts each row's k and v [rows, kv_heads, head_dim] into its slot of the caches [slots, kv_heads, head_dim].

    Args:
        k, v: contiguous, in the caches' dtype.
        slots: [rows] int64, in range: nobody checks.
        k_cache, v_cache: contiguous, written.
    """
    library = _library() if k.device.type == "cpu" else None
    if library is None:
        k_cache.index_copy_(0, slots, k)
        v_cache.index_copy_(0, slots, v)
        return
    library.rows_append(
        k.data_ptr(),
        v.data_ptr(),
        slots.data_ptr(),
        len(k),
        k_cache.stride(0) * k_cache.itemsize,
        k_cache.data_ptr(),
        v_cache.data_ptr(),
    )


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [gate | up] [rows, 2 n], contiguous -> [rows, n]; may write over what it is given.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    library = _library_for(gate_up)
    if library is None:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate, inplace=True).mul_(up)
    rows, size = gate_up.shape
    y = torch.empty(rows, size // 2)
    library.rows_swiglu(gate_up.data_ptr(), rows, size // 2, torch.get_num_threads(), y.data_ptr())
    return y


def _rotate_by_torch(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    # bf16 heads are turned in fp32 and rounded once: angles in bf16 would cost as much error as that.
    turned = out if out.dtype == cos.dtype else torch.empty_like(out, dtype=cos.dtype)
    x_first, x_second = x.chunk(2, dim=-1)
    first, second = turned.chunk(2, dim=-1)
    torch.mul(x, cos, out=turned)
    first.addcmul_(x_second, sin, value=-1)
    second.addcmul_(x_first, sin)
    if turned is not out:
        out.copy_(turned)


def _library_for(*tensors: Tensor) -> ctypes.CDLL | None:
    """The compiled form, where it is one for these."""
    for one in tensors:
        if one.dtype != torch.float32 or one.device.type != "cpu" or one.stride(-1) != 1:
            return None
    return _library()


@cache
def _library() -> ctypes.CDLL | None:
    library = load_native(SOURCE)
    if library is None:
        return None
    pointer, count, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    x = (pointer, count, count)
    library.rows_norm.argtypes = (*x, pointer, ctypes.c_float, count, count, count, threads, pointer)
    angles = (pointer, count)
    library.rows_rotate.argtypes = (*x, *angles, *angles, count, count, count, threads, *x)
    library.rows_swiglu.argtypes = (pointer, count, count, threads, pointer)
    library.rows_split.argtypes = (
        pointer,
        *angles,
        *angles,
        count,
        count,
        count,
        count,
        threads,
        pointer,
        pointer,
        pointer,
    )
    library.rows_append.argtypes = (pointer, pointer, pointer, count, count, pointer, pointer)
    for name in ("norm", "rotate", "split", "append", "swiglu"):
        getattr(library, f"rows_{name}").restype = None
    return library
