"""Keeps one worker registered with the directory for as long as its process lives.

Knows nothing of what the worker does: it asks a callback for the worker's state, each time anew.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from enum import StrEnum
from typing import TYPE_CHECKING, TypeAlias

import structlog

from sps2.internal.v1 import kv_directory_service_pb2 as pb
from sps2.v1.cluster_pb2 import WorkerCapabilities, WorkerInfo
from sps2_service.directory_rpc import DirectoryOptions, call, pauses
from sps2_service.errors import Internal, ServiceError, Unavailable
from sps2_service.lease_fence import LeaseFence

if TYPE_CHECKING:  # exists in the stub file alone
    from sps2.internal.v1.kv_directory_service_pb2_grpc import KvDirectoryServiceAsyncStub

CARRIED_INTERVALS = 1.5
"""A worker whose heartbeats another one carries sends its own after so many intervals without: well before its fence
falls."""

log = structlog.get_logger(__name__)


class Standing(StrEnum):
    """How a worker stands with the directory."""

    UNREGISTERED = "unregistered"
    """No lease: not registered yet, or it ended."""
    REGISTERED = "registered"
    """The last heartbeat renewed the lease."""
    DEGRADED = "degraded"
    """The directory answers, its store is away: no lease ends, nobody fences."""
    AWAY = "away"
    """The directory did not answer, or refused, the last heartbeat."""
    STALE = "stale"
    """Another process holds the lease; this one is to stop."""


Carried: TypeAlias = "tuple[pb.LeaseRenewal, Callable[[pb.LeaseStatus.ValueType], None]]"
"""Another worker's heartbeat, which this one's takes along, and who is told what the directory answers."""


async def _nobody() -> Sequence[Carried]:
    return ()


class Registration:
    """Registers a worker, renews its lease, registers again when the lease is gone; outlives any outage.

    A worker's heartbeats may go with another's (`lend`, `on_carried`), as a follower's do with its leader's. While
    they do it sends none; it waits half an interval longer for one to be asked for.
    """

    def __init__(
        self,
        stub: "KvDirectoryServiceAsyncStub",
        get_worker: Callable[[], WorkerInfo],
        options: DirectoryOptions,
        on_registered: Callable[[], None],
        on_stale: Callable[[], None] | None = None,
    ) -> None:
        """`get_worker` returns the worker as it is now, load included; called for each heartbeat.

        `on_registered` is called whenever a lease was granted: what is known of the worker's requests may have
        been lost with the one before.
        """
        self._on_registered = on_registered
        self._on_stale = on_stale
        self._stub = stub
        self._get_worker = get_worker
        self._options = options
        self._interval_s = options.renew_interval_s
        self._lease_ttl_s = options.lease_ttl_s
        self._leased = False
        self._capabilities = WorkerCapabilities()
        self._wake = asyncio.Event()
        self._due = 0.0
        self._lent: tuple[int, float] | None = None
        self._beating = asyncio.Lock()
        self._ended = asyncio.Event()
        self.standing = Standing.UNREGISTERED
        self.last_contact: float | None = None
        """time.monotonic() of *sending* the last heartbeat that was answered well; DEGRADED is well."""
        self.fence = LeaseFence()
        """What the worker may do, in time.monotonic()."""
        self.on_fence: Callable[[float], None] = lambda _holds_until: None
        """Told of each change of `fence.holds_until`."""
        self.collect: Callable[[], Awaitable[Sequence[Carried]]] = _nobody
        """Asked before each renewal for those that go with it."""

    def renew_now(self) -> None:
        """Sends the next heartbeat at once, because the worker's state has changed."""
        self._wake.set()

    def lend(self, number: int) -> pb.LeaseRenewal | None:
        """A heartbeat for somebody else to send; None without a lease, or when there is more to tell than one tells.

        `number` tells what `on_carried` is about; only the last one lent counts.
        """
        worker = self._get_worker()
        if self._ended.is_set() or not self._leased or worker.capabilities != self._capabilities:
            return None
        self._lent = number, time.monotonic()
        return renewal_of(worker)

    def on_carried(self, number: int, status: "pb.LeaseStatus.ValueType") -> None:
        """What the directory said of a heartbeat that was lent."""
        if self._lent is None or self._lent[0] != number or self._ended.is_set():
            return
        self._take(status, self._lent[1])
        self._due = time.monotonic() + CARRIED_INTERVALS * self._interval_s
        if not self._leased:
            self._wake.set()

    async def end(self) -> None:
        """Lets the heartbeat under way come back and sends no other: the worker gives its lease back.

        A heartbeat behind that would find no lease, and take a new one that outlives the process.
        """
        self._ended.set()
        async with self._beating:
            return

    async def run(self) -> None:
        """Runs until cancelled, or until another process took the lease: calls `on_stale`, returns."""
        retry = pauses(self._options)
        while self.standing is not Standing.STALE:
            pause = self._interval_s
            try:
                async with self._beating:
                    if not self._ended.is_set():
                        await self._beat()
                retry = pauses(self._options)
            except ServiceError as error:
                self._stand(Standing.AWAY, code=error.code.name, reason=error.reason, error=error.message)
                pause = min(next(retry), self._interval_s)
            if self._ended.is_set():
                await asyncio.Event().wait()  # until cancelled: nothing is left to do, and nothing is wrong
            if self.standing not in {Standing.UNREGISTERED, Standing.STALE}:
                await self._sleep(pause)
        if self._on_stale is not None:
            self._on_stale()

    async def _beat(self) -> None:
        sent = time.monotonic()
        worker = self._get_worker()
        self._take(await self._tell(worker), sent)

    def _take(self, status: "pb.LeaseStatus.ValueType", sent: float) -> None:
        standing = {
            pb.LEASE_STATUS_RENEWED: Standing.REGISTERED,
            pb.LEASE_STATUS_DEGRADED: Standing.DEGRADED,
            pb.LEASE_STATUS_STALE: Standing.STALE,
        }.get(status, Standing.UNREGISTERED)
        self._leased = standing in {Standing.REGISTERED, Standing.DEGRADED}
        if self._leased:
            self.last_contact = sent
        if standing is Standing.REGISTERED:
            self.fence.renew(sent, self._lease_ttl_s)
        elif standing is Standing.DEGRADED:
            self.fence.keep(sent, self._lease_ttl_s)
        else:
            self.fence.lose()
        self.on_fence(self.fence.holds_until)
        self._stand(standing)

    async def _tell(self, worker: WorkerInfo) -> "pb.LeaseStatus.ValueType":
        """Renewals carry what changes all the time; what a worker can do changes when its engine ends or has loaded."""
        if not self._leased:
            return await self._register(worker)
        if worker.capabilities == self._capabilities:
            return await self._renew(worker)
        try:
            return await self._register(worker)
        except Unavailable:
            # Perhaps for want of the store, which the lease is to outlive: the rest is told when that is back.
            return await self._renew(worker)

    async def _register(self, worker: WorkerInfo) -> "pb.LeaseStatus.ValueType":
        request = pb.RegisterWorkerRequest(worker=worker)
        reply = await call(self._stub.RegisterWorker, request, self._options.timeout_s)
        if reply.renew_interval_s > 0:
            self._interval_s = reply.renew_interval_s
        if reply.lease_ttl_s > 0:
            self._lease_ttl_s = reply.lease_ttl_s
        self._capabilities = worker.capabilities
        self._lent = None  # what is said of an older heartbeat is no news of this lease
        self._on_registered()
        return pb.LEASE_STATUS_RENEWED

    async def _renew(self, worker: WorkerInfo) -> "pb.LeaseStatus.ValueType":
        carried = await self.collect()
        request = pb.RenewLeaseRequest(renewals=[renewal_of(worker), *(renewal for renewal, _ in carried)])
        reply = await call(self._stub.RenewLease, request, self._options.timeout_s)
        if len(reply.statuses) != len(request.renewals):
            raise Internal("BAD_ANSWER", "the directory did not answer every renewal")
        for (_, tell), status in zip(carried, reply.statuses[1:], strict=True):
            tell(status)
        return reply.statuses[0]

    def _stand(self, standing: Standing, **facts: str) -> None:
        if standing is not self.standing:
            level = log.info if standing is Standing.REGISTERED else log.warning
            level("standing with the directory", now=standing.value, before=self.standing.value, **facts)
        self.standing = standing

    async def _sleep(self, pause: float) -> None:
        self._due = time.monotonic() + pause
        while not self._wake.is_set() and (left := self._due - time.monotonic()) > 0:
            with suppress(TimeoutError):  # nobody asked for an earlier heartbeat
                async with asyncio.timeout(left):
                    await self._wake.wait()
        self._wake.clear()


def renewal_of(worker: WorkerInfo) -> pb.LeaseRenewal:
    """The heartbeat of a worker as it is."""
    return pb.LeaseRenewal(
        worker_id=worker.worker_id,
        process_incarnation=worker.process_incarnation,
        state=worker.state,
        epoch=worker.epoch,
        load=worker.load,
        transfer_address=worker.transfer_address,
    )
