"""Cuts a prefill into slices of bounded work, at whose ends all ranks agree whether to go on. Pure: no torch.

The agreement is a collective, so every rank must come to it equally often and at the same place among the
other collectives. What lies between two collectives is a stage; how many slices end in it follows from the work
of the stage's busiest rank, which every rank counts alike. Each rank spreads them evenly over its own work. What
a stage leaves of a slice is carried to the next, so a short prompt is not interrupted at every stage.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from sps2_engine.layers.rows import ROW_CHUNK


class Stage:
    """One rank's work between two collectives; tell it what is done."""

    def __init__(self, num_slices: int, own_flops: int, end_slice: Callable[[], None]) -> None:
        self._num_slices = num_slices
        self._own_flops = own_flops
        self._end_slice = end_slice
        self.spent = 0
        """FLOPs done."""
        self._ended = 0

    def spend(self, flops: int) -> None:
        """So much of the rank's own work is done; ends the slices that are over with it."""
        self.spent += flops
        while self._ended < self._num_slices and self.spent * self._num_slices >= self._own_flops * (
            self._ended + 1
        ):
            self._end()

    def finish(self) -> None:
        """Ends the slices that are left: those of a rank with less to do than it said, or nothing."""
        while self._ended < self._num_slices:
            self._end()

    def _end(self) -> None:
        self._ended += 1
        self._end_slice()


class Slicer:
    """The slices of one prompt on one rank."""

    def __init__(self, slice_flops: int, end_slice: Callable[[], None]) -> None:
        """`end_slice` is called at the end of each slice; what it raises ends the prompt.

        Args:
            slice_flops: F, about so much work of the busiest rank makes a slice; the same on every rank.
            end_slice: Agrees with the other ranks.
        """
        if slice_flops < 1:
            raise ValueError("a slice has at least one FLOP")
        self.slice_flops = slice_flops
        self._end_slice = end_slice
        self._carried = 0

    @classmethod
    def endless(cls) -> Self:
        """One slice for everything: nothing is interrupted, nothing agreed upon."""
        return cls(1 << 62, lambda: None)

    @contextmanager
    def stage(self, most_flops: int, own_flops: int) -> Iterator[Stage]:
        """A stage, in which `most_flops` is the work of the busiest rank and `own_flops` that of this one."""
        num_slices, self._carried = divmod(self._carried + most_flops, self.slice_flops)
        stage = Stage(num_slices, own_flops, self._end_slice)
        yield stage
        stage.finish()

    def rows(self, most_rows: int, num_rows: int, flops_per_row: int) -> Iterator[slice]:
        """Chunks of this rank's rows to work on one after another, a slice's work at most in each.

        Args:
            most_rows: Rows of the rank that has most.
            num_rows: Rows of this one.
            flops_per_row: Work of a row.
        """
        chunk = max(1, min(ROW_CHUNK, self.slice_flops // flops_per_row))
        with self.stage(most_rows * flops_per_row, num_rows * flops_per_row) as stage:
            for start in range(0, num_rows, chunk):
                rows = slice(start, min(start + chunk, num_rows))
                yield rows
                stage.spend((rows.stop - rows.start) * flops_per_row)
