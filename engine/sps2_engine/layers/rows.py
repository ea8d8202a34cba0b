"""Row chunks: how wide, row-wise work on long prompts is kept from needing wide buffers for every token."""

from collections.abc import Iterator

ROW_CHUNK = 2048
"""Rows worked on at once. Large enough to fill a device's matrix units; at this size the temporaries of the
widest layer are a small part of the hidden states of a long prompt."""


def row_chunks(num_rows: int) -> Iterator[slice]:
    """Slices of at most `ROW_CHUNK` rows that cover `num_rows` rows in order; none for no rows."""
    for start in range(0, num_rows, ROW_CHUNK):
        yield slice(start, min(start + ROW_CHUNK, num_rows))
