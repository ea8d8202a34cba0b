"""`native/paged_decode.c` as a function, compiled for a shape when it is first needed.

One call attends for a whole batch. On two cores it reads keys and values at 50 GB/s out of cache, what a plain sum
over them does, where torch's flash operator does 13; out of memory at 18 to 20, where that does 10.
"""

import ctypes
from array import array
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from sps2_kernels.native_build import LANES, load_native

SOURCE = Path(__file__).parent / "native" / "paged_decode.c"

SlotRuns: TypeAlias = Sequence[tuple[int, int]]
"""Runs [begin, end) of cache slots that hold a row's keys, in any order; empty runs are not allowed."""
NativeDecode: TypeAlias = Callable[[Tensor, Tensor, Tensor, "Spans", float], tuple[Tensor, Tensor]]
"""(q, k_cache, v_cache, where the keys lie, scale) -> (o, lse), as `paged_decode_partial`."""


class Spans:
    """The runs of slots of all rows as the function reads them, changed in place as rows grow."""

    def __init__(self, runs: Sequence[SlotRuns]) -> None:
        self.bounds = array("q", [bound for row in runs for run in row for bound in run])
        """begin, end of each run, row after row."""
        self.first_run = array("q", [0])
        """Number of each row's first run, and behind it the number of runs."""
        for row in runs:
            self.first_run.append(self.first_run[-1] + len(row))

    def grow(self, row: int, runs: SlotRuns) -> bool:
        """Takes over a row's runs, of which the last has a new end; False where there is a new run: no room."""
        if len(runs) != self.first_run[row + 1] - self.first_run[row]:
            return False
        self.bounds[2 * self.first_run[row + 1] - 1] = runs[-1][1]
        return True


def native_decode(q: Tensor, k_cache: Tensor) -> NativeDecode | None:
    """The function for inputs of these shapes; None where it is no form for them, or cannot be compiled here."""
    num_kv_heads, head_dim = k_cache.shape[1:]
    if q.dtype != torch.float32 or k_cache.dtype != torch.float32 or head_dim % LANES:
        return None
    return _compiled(head_dim, num_kv_heads, q.shape[1] // num_kv_heads)


@cache
def _compiled(head_dim: int, num_kv_heads: int, fold: int) -> NativeDecode | None:
    sizes = (f"-DHEAD_DIM={head_dim}", f"-DKV_HEADS={num_kv_heads}", f"-DFOLD={fold}")
    library = load_native(SOURCE, sizes)
    if library is None:
        return None
    function = library.paged_decode
    pointer = ctypes.c_void_p
    function.argtypes = [pointer] * 5 + [ctypes.c_int64, ctypes.c_float, ctypes.c_int, pointer, pointer]
    function.restype = ctypes.c_int

    def call(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, spans: Spans, scale: float
    ) -> tuple[Tensor, Tensor]:
        if not (q.is_contiguous() and k_cache.is_contiguous() and v_cache.is_contiguous()):
            raise ValueError("q and the cache must be contiguous")
        o = torch.empty_like(q)
        lse = torch.empty(q.shape[:2], dtype=torch.float32)
        failed = function(
            q.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            spans.bounds.buffer_info()[0],
            spans.first_run.buffer_info()[0],
            len(q),
            scale,
            torch.get_num_threads(),
            o.data_ptr(),
            lse.data_ptr(),
        )
        if failed:
            raise MemoryError("no memory for the parts of decode attention")
        return o, lse

    return call
