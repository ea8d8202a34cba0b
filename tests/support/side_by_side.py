"""A pytest plugin: under pytest-xdist one worker runs what starts processes, the others what is pure.

Ranks and services already use all cores, and what their tests time must not be another test of the kind. What needs
no processes fills the time that those wait, at a lower priority.
"""

import os
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent
STARTS_PROCESSES = {"e2e", "multiprocess", "service"}
LOWER_PRIORITY = 10
GROUP = "processes"


def group_of(path: Path) -> str:
    """Tests of one group run in one worker, one after the other."""
    parts = path.relative_to(TESTS).parts
    return GROUP if parts[0] in STARTS_PROCESSES else "/".join(parts)


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks each test with its group."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group_of(item.path)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Lowers the priority of a worker once it has something pure to run."""
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    if is_worker and group_of(item.path) != GROUP and os.getpriority(os.PRIO_PROCESS, 0) < LOWER_PRIORITY:
        os.setpriority(os.PRIO_PROCESS, 0, LOWER_PRIORITY)
