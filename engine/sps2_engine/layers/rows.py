"""Row chunks: how wide, row-wise work on long prompts is kept from needing wide buffers for every token."""

from collections.abc import Callable, Iterator
from typing import TypeAlias

ROW_CHUNK = 2048
"""Rows worked on at once. Large enough to fill a device's matrix units; at this size the temporaries of the
widest layer are a small part of the hidden states of a long prompt."""

BYTE_FLOPS = 50
"""FLOPs that take about as long as writing one byte to fresh memory: 75 GFLOP/s and 1.5 GB/s on a core. What work
that only moves data is counted as, where it could last long without a look for a cancel."""

RowWalk: TypeAlias = Callable[[int, int], Iterator[slice]]
"""How row-wise work is cut: takes rows and FLOPs of a row, yields slices of at most `ROW_CHUNK` rows in order, each
worked on as it comes. `row_chunks`, or something that looks up between the chunks."""


def row_chunks(num_rows: int, _flops_per_row: int = 0) -> Iterator[slice]:
    """Slices of at most `ROW_CHUNK` rows that cover `num_rows` rows in order; none for no rows."""
    for start in range(0, num_rows, ROW_CHUNK):
        yield slice(start, min(start + ROW_CHUNK, num_rows))
