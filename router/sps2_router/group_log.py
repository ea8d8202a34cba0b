"""Writes down which groups come, change and go, as this router sees them. Decides nothing."""

from collections.abc import Iterable

import structlog

from sps2.v1 import cluster_pb2
from sps2_router.types import Group, group_workers

log = structlog.get_logger(__name__)


class GroupLog:
    """Remembers what it said last."""

    def __init__(self) -> None:
        self._states: dict[str, str] = {}

    def note(self, workers: Iterable[cluster_pb2.WorkerInfo]) -> None:
        """Says what is new about the groups that these workers form."""
        groups = group_workers(workers)
        now = {name: _state(group, self._states.get(name)) for name, group in groups.items()}
        for name in sorted(now.keys() | self._states.keys()):
            state, before = now.get(name, "gone"), self._states.get(name, "unknown")
            if state != before:
                log.info("group", group=name, state=state, before=before)
        self._states = now


def _state(group: Group, before: str | None) -> str:
    # Followers give their leases back a moment after their leader.
    if group.draining or (group.leader is None and before == "draining"):
        return "draining"
    return "ready" if group.ready else "starting"
