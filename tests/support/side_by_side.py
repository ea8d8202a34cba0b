"""A pytest plugin: under pytest-xdist one worker runs what starts processes, the other what is pure.

Ranks and services already use all cores, and what their tests time must not be another test of the kind. What depends
on no times fills those in which they wait, at a lower priority.
"""

import os

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

STARTS_PROCESSES = ("tests/e2e/", "tests/multiprocess/", "tests/service/")
NOT_TIMED = (
    "tests/multiprocess/test_bench.py",
    "tests/e2e/test_csa_serving.py",
    "tests/e2e/test_decode_mesh.py",
    "tests/e2e/test_identity.py",
    "tests/e2e/test_mesh.py",
)
"""They start processes too, but are right or wrong at any speed."""
LOWER_PRIORITY = 10


def may_be_timed(nodeid: str) -> bool:
    """Whether the test starts processes, and may depend on how fast they are."""
    return nodeid.startswith(STARTS_PROCESSES) and not nodeid.startswith(NOT_TIMED)


class SideBySide(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """What may be timed in one worker, in its order; the rest file by file."""

    def _split_scope(self, nodeid: str) -> str:
        return "timed" if may_be_timed(nodeid) else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> SideBySide:
    """See xdist's hook."""
    return SideBySide(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Lowers the priority of a worker once it has something else to run."""
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    if is_worker and not may_be_timed(item.nodeid) and os.getpriority(os.PRIO_PROCESS, 0) < LOWER_PRIORITY:
        os.setpriority(os.PRIO_PROCESS, 0, LOWER_PRIORITY)
