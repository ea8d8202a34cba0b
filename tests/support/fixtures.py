"""Fixtures for every test folder."""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from support.process import ManagedProcess

REPO_ROOT = Path(__file__).resolve().parents[2]
CALL_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Lets the fixtures below see at their end whether the test failed."""
    report = yield
    if report.failed:
        item.stash[CALL_FAILED] = True
    return report


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The top folder of the checkout."""
    return REPO_ROOT


@pytest.fixture
def processes(request: pytest.FixtureRequest) -> Generator[Callable[..., ManagedProcess]]:
    """`processes(command, name=..., env=..., cwd=...)` starts a child that ends with the test.

    All children end together, newest first; when the test failed, the end of each one's output is printed.
    """
    started: list[ManagedProcess] = []
    with ExitStack() as stack:

        def start(command: Sequence[str | Path], **options: Any) -> ManagedProcess:
            process = stack.enter_context(ManagedProcess(command, **options))
            started.append(process)
            return process

        yield start
    if request.node.stash.get(CALL_FAILED, False):
        for process in started:
            print(process.tail())  # noqa: T201 - pytest shows it with the failure
