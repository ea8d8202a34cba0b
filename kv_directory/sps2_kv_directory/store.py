"""The directory's state in Redis: each command is one Lua script. Knows nothing about gRPC.

    directory        hash    incarnation, revision, lease clock
    workers          hash    worker id -> incarnation and parts of its WorkerInfo
    worker_leases    zset    worker id -> end of its lease, lease time in µs
    changes          stream  worker changes, by revision; trimmed
    requests         hash    request id -> attempt, epoch, RequestRecord
    request_leases   zset    request id -> end of its lease
    epochs           hash    group -> last epoch drawn

Every command raises Unavailable within its timeout when Redis is away.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sps2.internal.v1.kv_directory_service_pb2 import LeaseRenewal, LeaseStatus, RequestRecord
from sps2.internal.v1.placement_pb2 import Attempt
from sps2.v1.cluster_pb2 import WorkerInfo
from sps2_kv_directory.codec import newest_epoch, split_renewal, split_worker
from sps2_kv_directory.script_runner import ScriptRunner, pairs
from sps2_service.errors import Aborted, NotFound

# Redis does nothing else while a script runs, so what one may do is bounded.
RENEWALS_PER_SCRIPT = 256
CHANGES_PER_SCRIPT = 512
EXPIRIES_PER_SCRIPT = 512


@dataclass(frozen=True)
class StoreState:
    """All live workers at one revision."""

    incarnation: str
    """Drawn when the data began."""
    revision: int
    """Number of worker changes since then."""
    workers: list[WorkerInfo]
    """Ordered by id."""
    num_requests: int
    """Requests recorded."""


@dataclass(frozen=True)
class WorkerChange:
    """One step from a revision to the next: exactly one of the two is set."""

    updated: WorkerInfo | None
    """The worker as it is now."""
    removed: str | None
    """Id of the worker that left or expired."""


@dataclass(frozen=True)
class Expired:
    """What one call of `expire` ended."""

    num_workers: int
    num_requests: int

    @property
    def more(self) -> bool:
        """Whether there may be more to end now."""
        return EXPIRIES_PER_SCRIPT in (self.num_workers, self.num_requests)


class Store:
    """The commands, one method each."""

    def __init__(self, runner: ScriptRunner) -> None:
        self._runner = runner

    async def register(self, worker: WorkerInfo) -> None:
        """Takes a worker up under a lease; whoever held that id loses it."""
        parts = split_worker(worker)
        await self._runner.run(
            "register", worker.worker_id, worker.process_incarnation, parts.static, parts.vital, parts.load
        )

    async def renew(self, renewals: Sequence[LeaseRenewal]) -> "list[LeaseStatus.ValueType]":
        """Renews leases; RENEWED, NOT_FOUND or STALE for each, in order."""
        statuses: list[LeaseStatus.ValueType] = []
        for begin in range(0, len(renewals), RENEWALS_PER_SCRIPT):
            args: list[str | bytes] = []
            for renewal in renewals[begin : begin + RENEWALS_PER_SCRIPT]:
                parts = split_renewal(renewal)
                args += [renewal.worker_id, renewal.process_incarnation, parts.vital, parts.load]
            statuses += await self._runner.run("renew", *args)
        return statuses

    async def deregister(self, worker_id: str, process_incarnation: str) -> None:
        """Ends a lease at once.

        Raises:
            NotFound: no such worker.
            Aborted: another incarnation holds the lease.
        """
        status = await self._runner.run("deregister", worker_id, process_incarnation)
        if status == LeaseStatus.LEASE_STATUS_NOT_FOUND:
            raise NotFound("UNKNOWN_WORKER", f"no lease for worker {worker_id!r}")
        if status == LeaseStatus.LEASE_STATUS_STALE:
            raise Aborted("STALE_INCARNATION", f"another process holds the lease of worker {worker_id!r}")

    async def draw_epoch(self, group: str) -> int:
        """max(the group's last + 1, Redis TIME in µs), so that no epoch comes again after Redis forgot."""
        return int(await self._runner.run("draw_epoch", group))

    async def record(self, record: RequestRecord, lease_s: float) -> None:
        """Records an attempt, in place of older ones, until `lease_s` from now.

        Raises:
            Aborted: a newer attempt, or this one under a newer epoch, is recorded.
        """
        attempt = record.attempt
        status = await self._runner.run(
            "record_shards",
            attempt.request_id,
            attempt.number,
            newest_epoch(record),
            round(lease_s * 1e6),
            record.SerializeToString(),
        )
        if status == LeaseStatus.LEASE_STATUS_STALE:
            raise Aborted(
                "STALE_ATTEMPT", f"attempt {attempt.number} was overtaken by a newer attempt or epoch"
            )

    async def locate(self, request_id: str) -> RequestRecord:
        """The newest attempt of a request.

        Raises:
            NotFound: none is recorded.
        """
        record = await self._runner.run("locate", request_id)
        if record is None:
            raise NotFound("UNKNOWN_REQUEST", "no attempt of this request is recorded")
        return RequestRecord.FromString(record)

    async def release(self, attempt: Attempt) -> None:
        """Forgets an attempt and older ones.

        Raises:
            NotFound: none is recorded.
            Aborted: a newer attempt is recorded; it stays.
        """
        status = await self._runner.run("release", attempt.request_id, attempt.number)
        if status == LeaseStatus.LEASE_STATUS_NOT_FOUND:
            raise NotFound("UNKNOWN_REQUEST", "no attempt of this request is recorded")
        if status == LeaseStatus.LEASE_STATUS_STALE:
            raise Aborted("STALE_ATTEMPT", f"a newer attempt than {attempt.number} is recorded")

    async def state(self) -> StoreState:
        """All live workers and counts."""
        incarnation, revision, num_requests, *workers = await self._runner.run("state")
        infos = [WorkerInfo.FromString(worker) for worker in workers]
        infos.sort(key=lambda info: info.worker_id)
        return StoreState(incarnation.decode(), revision, infos, num_requests)

    async def changes(self, incarnation: str, revision: int) -> list[WorkerChange] | None:
        """The changes that follow `revision`, oldest first, at most CHANGES_PER_SCRIPT.

        None when they cannot be had without a gap: take the state anew.
        """
        reply = await self._runner.run("changes", incarnation, revision, CHANGES_PER_SCRIPT)
        return None if reply is None else [_change(kind, value) for kind, value in pairs(reply)]

    async def expire(self) -> Expired:
        """Ends leases that are over, at most EXPIRIES_PER_SCRIPT of each kind."""
        return Expired(*await self._runner.run("expire", EXPIRIES_PER_SCRIPT))

    async def close(self) -> None:
        """Closes the connections to Redis."""
        await self._runner.close()


def _change(kind: bytes, value: bytes) -> WorkerChange:
    if kind == b"removed":
        return WorkerChange(updated=None, removed=value.decode())
    return WorkerChange(updated=WorkerInfo.FromString(value), removed=None)
