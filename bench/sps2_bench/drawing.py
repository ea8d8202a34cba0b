"""Figures as PNG files, without a display."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["Axes", "figure", "panels"]


@contextmanager
def panels(path: Path, rows: int, columns: int, size: tuple[float, float]) -> Generator[list[Axes]]:
    """A grid of axes to draw on, row by row; the file is written at the end, its folder made where needed.

    A Figure of its own, not pyplot's: no global state and no backend to choose.

    Args:
        path: of the PNG file.
        rows: of the grid.
        columns: of the grid.
        size: inches of one panel, width and height.
    """
    drawing = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    yield list(drawing.subplots(rows, columns, squeeze=False).flat)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=120)


@contextmanager
def figure(path: Path) -> Generator[Axes]:
    """One panel; see `panels`."""
    with panels(path, 1, 1, (8.0, 5.0)) as (axes,):
        yield axes
