"""A replica's own copy of the worker state: follows the store's change log and feeds the watchers.

Watchers are served from here, also while the store is away. It knows nothing about gRPC.
"""

import asyncio
from collections.abc import AsyncGenerator, ValuesView

import structlog

from sps2.internal.v1.kv_directory_service_pb2 import WatchWorkersResponse, WorkerSnapshot
from sps2.v1.cluster_pb2 import WorkerInfo
from sps2_kv_directory.script_runner import away
from sps2_kv_directory.store import CHANGES_PER_SCRIPT, Store, WorkerChange
from sps2_kv_directory.watch import WatchHub
from sps2_service.errors import Unavailable

log = structlog.get_logger(__name__)


class Membership:
    """Workers as of one revision of one directory incarnation.

    When the store's data is lost, workers of the lost incarnation are kept in view until the directory has
    recovered, by when the living have registered again; watchers then get a snapshot without the others.
    Without this every router would see an empty cluster for as long as it takes the workers to notice.
    """

    def __init__(self, store: Store, hub: WatchHub, *, poll_interval_s: float) -> None:
        self._store = store
        self._hub = hub
        self._poll_interval_s = poll_interval_s
        self._incarnation: str | None = None
        self._log = ""
        self._revision = 0
        self._workers: dict[str, WorkerInfo] = {}
        self._held: dict[str, WorkerInfo] = {}
        self._recovering = False

    @property
    def workers(self) -> "ValuesView[WorkerInfo]":
        """Live workers, as of `revision`."""
        return self._workers.values()

    @property
    def revision(self) -> int:
        """Of the store's log of changes, as far as it was followed."""
        return self._revision

    @property
    def recovering(self) -> bool:
        """Whether the store has lost its data a moment ago."""
        return self._recovering

    async def run(self) -> None:
        """Follows the store until it is cancelled; while the store is away the copy stays as it is."""
        while True:
            try:
                behind = await self.follow()
            except Unavailable:
                behind = False  # the runner has logged it
            if not behind:
                await asyncio.sleep(self._poll_interval_s)

    async def follow(self) -> bool:
        """One look at the store; whether there may be more to read at once. Raises Unavailable."""
        changes = None
        if self._incarnation is not None:
            changes = await self._store.changes(self._log, self._revision)
        if changes is None:
            await self._take_snapshot()
            return False
        for change in changes.changes:
            self._apply(change)
        if self._recovering and not changes.recovering:
            self._end_recovery()
            self._hub.publish(self._snapshot())
        return len(changes.changes) == CHANGES_PER_SCRIPT

    def watch(self) -> AsyncGenerator[WatchWorkersResponse]:
        """A snapshot, then changes.

        Raises:
            Unavailable: nothing was read from the store yet; later: the watcher was cut.
        """
        if self._incarnation is None:
            raise away("the store has not been read yet")
        return self._hub.watch(self._snapshot)

    async def _take_snapshot(self) -> None:
        state = await self._store.state()
        if self._incarnation not in {None, state.incarnation}:
            log.warning("the store lost its data; workers register again", incarnation=state.incarnation)
            self._held |= self._workers
        self._incarnation, self._log, self._revision = state.incarnation, state.log, state.revision
        self._recovering = state.recovering
        self._workers = {worker.worker_id: worker for worker in state.workers}
        for worker_id in self._workers:
            self._held.pop(worker_id, None)
        if not self._recovering:
            self._end_recovery()
        self._hub.publish(self._snapshot())

    def _end_recovery(self) -> None:
        if self._held:
            log.warning("workers did not come back after the store lost its data", workers=sorted(self._held))
        self._recovering, self._held = False, {}

    def _snapshot(self) -> WatchWorkersResponse:
        view = self._held | self._workers
        workers = [view[worker_id] for worker_id in sorted(view)]
        snapshot = WorkerSnapshot(workers=workers, recovering=self._recovering)
        return WatchWorkersResponse(revision=self._revision, snapshot=snapshot)

    def _apply(self, change: WorkerChange) -> None:
        self._revision += 1
        if change.updated is not None:
            self._workers[change.updated.worker_id] = change.updated
            self._held.pop(change.updated.worker_id, None)
            self._hub.publish(WatchWorkersResponse(revision=self._revision, updated=change.updated))
        elif change.removed is not None:
            self._workers.pop(change.removed, None)
            self._hub.publish(WatchWorkersResponse(revision=self._revision, removed_worker_id=change.removed))
