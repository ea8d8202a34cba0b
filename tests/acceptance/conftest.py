"""One line for each "Must show" of an issue: its name, ok or FAIL, and the figure that shows it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from support.must_show import MustShow


@pytest.fixture
def must_show(capfd: pytest.CaptureFixture[str]) -> MustShow:
    """A context manager `must_show(name)`: append figures to its list; it prints the line at its end."""

    @contextmanager
    def shown(name: str) -> Iterator[list[str]]:
        figures: list[str] = []
        verdict = "FAIL"
        try:
            yield figures
            verdict = "ok"
        finally:
            with capfd.disabled():
                print(f"\n{name}: {verdict} {'; '.join(figures)}".rstrip(), flush=True)  # noqa: T201

    return shown
