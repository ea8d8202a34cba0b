"""The KV directory as its clients see it: workers' supervisors and routers. Torch-free.

Every call has a deadline, and an absent directory is no error where the design goes on without it: leases,
views, epochs, records.
"""

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from types import TracebackType
from typing import Self

import structlog

from sps2.internal.v1 import kv_directory_service_pb2 as pb
from sps2.internal.v1.kv_directory_service_pb2_grpc import KvDirectoryServiceStub
from sps2.internal.v1.placement_pb2 import Attempt
from sps2.v1.cluster_pb2 import WorkerInfo
from sps2_service.channel import open_channel
from sps2_service.directory_membership import Membership, watch_workers
from sps2_service.directory_prefixes import HeldPrefixes
from sps2_service.directory_recorder import Recorder
from sps2_service.directory_registration import Registration, Standing
from sps2_service.directory_rpc import DirectoryOptions, call
from sps2_service.errors import DeadlineExceeded, NotFound, ServiceError, Unavailable
from sps2_service.tls import Tls

__all__ = ["DirectoryClient", "DirectoryOptions", "Membership", "Registration", "Standing"]

log = structlog.get_logger(__name__)


class DirectoryClient:
    """One client of the directory; made inside a running event loop, closed by `close` or `async with`.

    A supervisor:

        async with DirectoryClient("127.0.0.1:50060") as directory, asyncio.TaskGroup() as tasks:
            tasks.create_task(directory.keep_registered(lambda: worker, on_stale=stop))

    A router:

        membership = directory.membership()
        tasks.create_task(membership.run())
    """

    def __init__(
        self, address: str, options: DirectoryOptions | None = None, *, tls: Tls | None = None
    ) -> None:
        """`address`: HOST:PORT of the replicas; nothing is sent yet. `tls` None: plaintext."""
        self._options = options = options or DirectoryOptions()
        self._channel = open_channel(address, tls=tls)
        self._stub = KvDirectoryServiceStub(self._channel)
        self._recorder = Recorder(options.max_queued_records)
        self._recorded: dict[str, pb.RecordShardsRequest] = {}
        """By request id: what was recorded last and not released."""
        self._prefixes: HeldPrefixes | None = None

    # --- workers -------------------------------------------------------------------------------------------

    async def keep_registered(
        self, get_worker: Callable[[], WorkerInfo], *, on_stale: Callable[[], None] | None = None
    ) -> None:
        """Registers a worker, renews its lease, registers again when the lease is gone; outlives any outage.

        Runs until it is cancelled, or another process takes the worker's lease: then it calls `on_stale` and
        returns. `get_worker` is called for each heartbeat and returns the worker as it is now.
        """
        await self.registration(get_worker, on_stale=on_stale).run()

    def registration(
        self, get_worker: Callable[[], WorkerInfo], *, on_stale: Callable[[], None] | None = None
    ) -> Registration:
        """The same, to be run by the caller (`run()`), with `renew_now`, `standing` and `fence`."""
        self._prefixes = HeldPrefixes(self._stub, self._recorder, get_worker, self._options)
        return Registration(self._stub, get_worker, self._options, self._tell_again, on_stale)

    async def deregister(self, worker_id: str, process_incarnation: str) -> bool:
        """Ends a lease at once; False when there is none, it is not ours, or the directory is away."""
        request = pb.DeregisterWorkerRequest(worker_id=worker_id, process_incarnation=process_incarnation)
        try:
            await call(self._stub.DeregisterWorker, request, self._options.timeout_s)
        except ServiceError as error:
            log.warning("not deregistered", worker_id=worker_id, code=error.code.name, reason=error.reason)
            return False
        return True

    async def draw_epoch(self, group: str, previous: int = 0) -> int:
        """An epoch larger than `previous` and than every one drawn for the group before.

        While the directory is away: max(previous + 1, local time in µs). The group's leader alone draws, and
        clocks of the group's machines agree far better than groups are formed anew, so it still grows.
        """
        try:
            request = pb.DrawEpochRequest(group=group, previous=previous)
            drawn = (await call(self._stub.DrawEpoch, request, self._options.timeout_s)).epoch
        except ServiceError as error:
            drawn = time.time_ns() // 1000
            log.warning("epoch drawn from the local clock", group=group, epoch=drawn, code=error.code.name)
        return max(drawn, previous + 1)

    # --- routers -------------------------------------------------------------------------------------------

    def membership(self) -> Membership:
        """A view of the workers, kept by its `run()`, which the caller starts as a task."""
        return Membership(self._stub, self._options)

    def watch_workers(self) -> AsyncGenerator[pb.WatchWorkersResponse]:
        """One watch: a snapshot, then changes without gaps; ends by a ServiceError. Close it (`aclosing`)."""
        return watch_workers(self._stub, self._options)

    async def get_cluster_state(self) -> pb.GetClusterStateResponse:
        """All live workers and counts. Raises ServiceError."""
        return await call(self._stub.GetClusterState, pb.GetClusterStateRequest(), self._options.timeout_s)

    # --- requests ------------------------------------------------------------------------------------------

    def record_shards(self, record: pb.RequestRecord, lease_s: float = 0.0) -> None:
        """Tells where an attempt's KV lies; returns at once. `lease_s` 0 takes the directory's default.

        It is told again whenever a worker of this client is registered anew, until it is released.
        """
        request = pb.RecordShardsRequest(record=record, lease_s=lease_s)
        self._recorded[record.attempt.request_id] = request
        self._submit(request)

    def _submit(self, request: pb.RecordShardsRequest) -> None:
        self._recorder.submit(
            request.record.attempt.request_id,
            lambda: call(self._stub.RecordShards, request, self._options.timeout_s),
        )

    def _tell_again(self) -> None:
        for request in self._recorded.values():
            self._submit(request)
        if self._prefixes is not None:
            self._prefixes.tell_again()

    def release(self, attempt: Attempt) -> None:
        """Forgets an attempt; returns at once. Sent after what was recorded for the request before."""
        known = self._recorded.get(attempt.request_id)
        if known is not None and known.record.attempt.number <= attempt.number:
            del self._recorded[attempt.request_id]
        request = pb.ReleaseRequestRequest(attempt=attempt)
        self._recorder.submit(
            attempt.request_id, lambda: call(self._stub.ReleaseRequest, request, self._options.timeout_s)
        )

    @property
    def num_dropped(self) -> int:
        """Records and releases that could not be told, since the start."""
        return self._recorder.num_dropped

    async def flush(self, timeout_s: float) -> None:
        """Waits until what was recorded and released so far is sent or dropped; raises TimeoutError."""
        await self._recorder.flush(timeout_s)

    async def locate(self, request_id: str, timeout_s: float | None = None) -> pb.RequestRecord | None:
        """The newest attempt of a request; None when none is known.

        Raises:
            ServiceError: the directory is away, or has lost its data and may learn of it yet.
        """
        reply = await self._locate(request_id, timeout_s)
        return reply.record if reply is not None and reply.HasField("record") else None

    async def locate_call(self, request_id: str) -> pb.RequestAdmission | None:
        """The call that a router serves a request by; None when none is known. Raises like `locate`."""
        reply = await self._locate(request_id, None)
        return reply.admission if reply is not None and reply.HasField("admission") else None

    async def _locate(self, request_id: str, timeout_s: float | None) -> pb.LocateRequestResponse | None:
        request = pb.LocateRequestRequest(request_id=request_id)
        try:
            return await call(self._stub.LocateRequest, request, timeout_s or self._options.timeout_s)
        except NotFound:
            return None

    async def admit(
        self, admissions: Sequence[pb.RequestAdmission], lease_s: float
    ) -> Sequence[pb.AdmissionResult]:
        """Tells which calls this router serves, at most 256; answers in order. Raises ServiceError."""
        request = pb.AdmitRequestsRequest(admissions=admissions, lease_s=lease_s)
        return (await call(self._stub.AdmitRequests, request, self._options.timeout_s)).results

    def dismiss(self, request_id: str, call_id: str) -> None:
        """Forgets an admission; returns at once."""
        request = pb.DismissRequestRequest(request_id=request_id, call_id=call_id)
        self._recorder.submit(
            request_id, lambda: call(self._stub.DismissRequest, request, self._options.timeout_s)
        )

    # --- prefixes ------------------------------------------------------------------------------------------

    @property
    def prefixes(self) -> HeldPrefixes:
        """What the registered worker's group holds; told in the background, and again like shards."""
        assert self._prefixes is not None, "a worker registers before it holds anything"
        return self._prefixes

    async def record_prefix(self, holder: pb.PrefixHolder, keys: Sequence[bytes]) -> None:
        """Tells that a worker's group holds blocks; at most 64 keys. Raises ServiceError."""
        request = pb.RecordPrefixRequest(holder=holder, keys=keys)
        await call(self._stub.RecordPrefix, request, self._options.timeout_s)

    async def evict_prefix(self, holder: pb.PrefixHolder, keys: Sequence[bytes]) -> None:
        """Takes back what `record_prefix` told; at most 64 keys. Raises ServiceError."""
        request = pb.EvictPrefixRequest(holder=holder, keys=keys)
        await call(self._stub.EvictPrefix, request, self._options.timeout_s)

    async def find_prefix(self, keys: Sequence[bytes]) -> list[pb.PrefixMatch]:
        """Who holds the beginning of a chain of blocks, the longest run first; at most 64 keys.

        Empty also when the directory does not answer within `find_timeout_s`: a prompt goes on without reuse.
        """
        request = pb.FindPrefixRequest(keys=keys)
        try:
            reply = await call(self._stub.FindPrefix, request, self._options.find_timeout_s)
        except (Unavailable, DeadlineExceeded) as error:
            log.info("no prefix looked up", code=error.code.name, reason=error.reason)
            return []
        return list(reply.matches)

    async def close(self) -> None:
        """Drops what is queued and closes the channel; tasks of this client are to be ended before."""
        await self._recorder.close()
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        await self.close()
