"""A client's view of the workers: follows the directory's watch, and stays as it was while that is away."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING

import grpc
import structlog

from sps2.internal.v1 import kv_directory_service_pb2 as pb
from sps2.v1.cluster_pb2 import WorkerInfo
from sps2_service.directory_rpc import DirectoryOptions, pauses
from sps2_service.errors import Aborted, DeadlineExceeded, ServiceError, Unavailable
from sps2_service.status import from_rpc_error

if TYPE_CHECKING:  # exists in the stub file alone
    from sps2.internal.v1.kv_directory_service_pb2_grpc import KvDirectoryServiceAsyncStub

log = structlog.get_logger(__name__)


async def watch_workers(
    stub: "KvDirectoryServiceAsyncStub", options: DirectoryOptions
) -> AsyncGenerator[pb.WatchWorkersResponse]:
    """One watch: a snapshot, then changes without gaps; it ends only by an error.

    Raises:
        DeadlineExceeded: no snapshot within `first_snapshot_timeout_s`.
        Aborted: a revision is missing; watch again.
        ServiceError: the stream failed, as a directory that goes away makes it.
    """
    watch = stub.WatchWorkers(pb.WatchWorkersRequest())
    revision = None
    try:
        while True:
            # Later messages may be hours apart: there the channel's keepalive notices a dead directory.
            async with asyncio.timeout(options.first_snapshot_timeout_s if revision is None else None):
                response = await watch.read()
            if not isinstance(response, pb.WatchWorkersResponse):
                raise Unavailable("WATCH_ENDED", "the directory ended the watch")
            if not response.HasField("snapshot") and (revision is None or response.revision != revision + 1):
                raise Aborted("WATCH_GAP", f"revision {response.revision} followed {revision}")
            revision = response.revision
            yield response
    except TimeoutError:
        raise DeadlineExceeded("WATCH_SILENT", "the directory sent no snapshot in time") from None
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None
    finally:
        watch.cancel()


class Membership:
    """The live workers as last heard of.

    `connected` tells whether the view is being kept up; while it is not, the view holds what was last known.
    """

    def __init__(self, stub: "KvDirectoryServiceAsyncStub", options: DirectoryOptions) -> None:
        self._stub = stub
        self._options = options
        self._workers: dict[str, WorkerInfo] = {}
        self.connected = False
        self.revision = 0
        self.changed = asyncio.Condition()
        """Notified after each change of the view, and when `connected` changes."""

    @property
    def workers(self) -> Mapping[str, WorkerInfo]:
        """Worker id -> worker. Live: copy it before awaiting; the infos themselves are never changed."""
        return self._workers

    async def wait_for(self, predicate: Callable[[Mapping[str, WorkerInfo]], bool], timeout_s: float) -> None:
        """Waits until the view satisfies `predicate`; raises TimeoutError after `timeout_s`."""
        async with asyncio.timeout(timeout_s), self.changed:
            await self.changed.wait_for(lambda: predicate(self._workers))

    async def run(self) -> None:
        """Keeps the view until it is cancelled; begins a new watch whenever one ends."""
        retry = pauses(self._options)
        while True:
            try:
                async with aclosing(watch_workers(self._stub, self._options)) as responses:
                    async for response in responses:
                        retry = pauses(self._options)
                        await self._take(response)
            except ServiceError as error:
                await self._lost(error)
            await asyncio.sleep(next(retry))

    async def _take(self, response: pb.WatchWorkersResponse) -> None:
        async with self.changed:
            kind = response.WhichOneof("event")
            if kind == "snapshot":
                # Of a directory that lost its data the snapshot is no news of who left.
                kept = self._workers if response.snapshot.recovering else {}
                self._workers = kept | {worker.worker_id: worker for worker in response.snapshot.workers}
            elif kind == "updated":
                self._workers[response.updated.worker_id] = response.updated
            elif kind == "removed_worker_id":
                self._workers.pop(response.removed_worker_id, None)
            if not self.connected:
                log.info("following the directory", workers=len(self._workers), revision=response.revision)
            self.connected = True
            self.revision = response.revision
            self.changed.notify_all()

    async def _lost(self, error: ServiceError) -> None:
        if not self.connected:
            return  # said already
        log.warning("lost the directory; its last state is used", code=error.code.name, reason=error.reason)
        async with self.changed:
            self.connected = False
            self.changed.notify_all()
