"""A pytest plugin: under pytest-xdist one worker runs what starts processes, the other what is pure.

Ranks and services already use all cores, and what their tests time must not be another test of the kind. What needs
no processes fills the time that those wait, at a lower priority.
"""

import os

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

STARTS_PROCESSES = ("tests/e2e/", "tests/multiprocess/", "tests/service/")
ONLY_RUNS = "tests/multiprocess/test_bench.py"
"""Benchmarks start processes too, but their times are nobody's concern here."""
LOWER_PRIORITY = 10


def starts_processes(nodeid: str) -> bool:
    """Whether the test is of a folder whose tests do, and may depend on how fast they are."""
    return nodeid.startswith(STARTS_PROCESSES) and not nodeid.startswith(ONLY_RUNS)


class SideBySide(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """What starts processes in one worker, in its order; the rest file by file."""

    def _split_scope(self, nodeid: str) -> str:
        return "processes" if starts_processes(nodeid) else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> SideBySide:
    """See xdist's hook."""
    return SideBySide(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Lowers the priority of a worker once it has something pure to run."""
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    if (
        is_worker
        and not starts_processes(item.nodeid)
        and os.getpriority(os.PRIO_PROCESS, 0) < LOWER_PRIORITY
    ):
        os.setpriority(os.PRIO_PROCESS, 0, LOWER_PRIORITY)
