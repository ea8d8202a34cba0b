"""The directory's state in Redis: each command is one Lua script. Knows nothing about gRPC.

    directory        hash    incarnation, revision, lease clock
    workers          hash    worker id -> incarnation and parts of its WorkerInfo
    worker_leases    zset    worker id -> end of its lease, lease time in µs
    changes          stream  worker changes, by revision; trimmed
    requests         hash    request id -> attempt, epoch, RequestRecord
    request_leases   zset    request id -> end of its lease
    epochs           hash    group -> last epoch drawn
    prefixes         hash    key of a block -> its holders and their layouts
    prefix_index     zset    worker, token, key: what each worker told under which token
    sweeps           list    worker, token: what is void and is forgotten bit by bit
    admissions       hash    request id -> the call that a router serves it by
    admission_leases zset    request id -> end of its lease

Every command raises Unavailable within its timeout when Redis is away.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sps2.internal.v1.kv_directory_service_pb2 import (
    AdmissionResult,
    AdmissionStatus,
    LeaseRenewal,
    LeaseStatus,
    LocateRequestResponse,
    PrefixHolder,
    PrefixMatch,
    RequestAdmission,
    RequestRecord,
)
from sps2.internal.v1.placement_pb2 import Attempt, AttentionLayout
from sps2.v1.cluster_pb2 import WorkerInfo
from sps2_kv_directory.codec import layout_bytes, newest_epoch, split_renewal, split_worker
from sps2_kv_directory.script_runner import ScriptRunner, pairs
from sps2_service.errors import Aborted, NotFound, Unavailable

# Redis does nothing else while a script runs, so what one may do is bounded.
RENEWALS_PER_SCRIPT = 256
CHANGES_PER_SCRIPT = 512
EXPIRIES_PER_SCRIPT = 512
MAX_PREFIX_MATCHES = 16


@dataclass(frozen=True)
class StoreState:
    """All live workers at one revision."""

    incarnation: str
    """Drawn when the data began."""
    log: str
    """Names the log of changes in which `revision` counts; another one after Redis was started again."""
    revision: int
    """Number of worker changes since then."""
    workers: list[WorkerInfo]
    """Ordered by id."""
    num_requests: int
    """Requests recorded."""
    num_prefix_keys: int
    """Keys of prefix blocks that somebody holds."""
    recovering: bool
    """The data began less than one TTL ago: who was known before may not have registered again yet."""


@dataclass(frozen=True)
class Changes:
    """What followed a revision, oldest first, at most CHANGES_PER_SCRIPT."""

    changes: "list[WorkerChange]"
    recovering: bool
    """See `StoreState`."""


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
    num_prefix_keys: int
    """Told by workers, or in epochs, that ended."""

    num_admissions: int = 0
    """Of calls whose router is gone."""

    @property
    def more(self) -> bool:
        """Whether there may be more to end now."""
        counts = (self.num_workers, self.num_requests, self.num_prefix_keys, self.num_admissions)
        return EXPIRIES_PER_SCRIPT in counts


class Store:
    """The commands, one method each."""

    def __init__(self, runner: ScriptRunner) -> None:
        self._runner = runner
        self._num_failures_told = 0

    @property
    def is_away(self) -> bool:
        """Whether Redis did not answer when it was asked last."""
        return self._runner.is_away

    async def register(self, worker: WorkerInfo) -> None:
        """Takes a worker up under a lease; whoever held that id loses it."""
        parts = split_worker(worker)
        await self._runner.run(
            *("register", worker.worker_id, worker.process_incarnation),
            *(parts.static, parts.vital, parts.load, worker.epoch, worker.group),
        )

    async def renew(self, renewals: Sequence[LeaseRenewal]) -> "list[LeaseStatus.ValueType]":
        """Renews leases; RENEWED, NOT_FOUND or STALE for each, in order."""
        statuses: list[LeaseStatus.ValueType] = []
        for begin in range(0, len(renewals), RENEWALS_PER_SCRIPT):
            args: list[str | bytes] = []
            for renewal in renewals[begin : begin + RENEWALS_PER_SCRIPT]:
                parts = split_renewal(renewal)
                args += [renewal.worker_id, renewal.process_incarnation, parts.vital, parts.load]
                args.append(str(renewal.epoch))
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

    async def draw_epoch(self, group: str, previous: int = 0) -> int:
        """max(the group's last + 1, `previous` + 1, Redis TIME in µs): none comes again after Redis forgot."""
        return int(await self._runner.run("draw_epoch", group, previous))

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

    async def admit(self, admissions: Sequence[RequestAdmission], lease_s: float) -> list[AdmissionResult]:
        """Admits calls, or renews their leases; answers in order."""
        args: list[str | bytes] = []
        for one in admissions:
            args += [one.request_id, one.call_id, one.nonce, str(int(one.renewal)), one.SerializeToString()]
        reply = await self._runner.run("admit", round(lease_s * 1e6), *args)
        return [_admission_result(*one) for one in zip(reply[::2], reply[1::2], strict=True)]

    async def dismiss(self, request_id: str, call_id: str) -> None:
        """Forgets an admission.

        Raises:
            NotFound: the request is not this call's.
        """
        if await self._runner.run("dismiss", request_id, call_id) == LeaseStatus.LEASE_STATUS_NOT_FOUND:
            raise NotFound("UNKNOWN_REQUEST", "this call is not admitted")

    async def locate(self, request_id: str) -> LocateRequestResponse:
        """The call that serves a request and its newest attempt, as far as they are known.

        Raises:
            NotFound: neither is recorded.
            Unavailable: neither has been recorded again since the data were lost.
        """
        found = await self._runner.run("locate", request_id)
        if found is None:
            raise NotFound("UNKNOWN_REQUEST", "nothing of this request is recorded")
        if found == 0:
            raise Unavailable("RECOVERING", "the directory lost its data; try again", retry_after=1.0)
        record, admission = found
        return LocateRequestResponse(
            record=RequestRecord.FromString(record) if record else None,
            admission=RequestAdmission.FromString(admission) if admission else None,
        )

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

    async def record_prefix(self, holder: PrefixHolder, keys: Sequence[bytes]) -> None:
        """Notes that a worker's group holds blocks, for as long as its lease and epoch last.

        Raises:
            Aborted: the worker is in a newer incarnation or epoch.
            NotFound: it has no lease, or has not told of this epoch yet.
        """
        _check_holder(await self._tell("record_prefix", holder, keys), holder)

    async def evict_prefix(self, holder: PrefixHolder, keys: Sequence[bytes]) -> None:
        """Takes back what `record_prefix` noted. Raises like it."""
        _check_holder(await self._tell("evict_prefix", holder, keys), holder)

    async def find_prefix(self, keys: Sequence[bytes]) -> list[PrefixMatch]:
        """Who holds the longest leading runs of a chain, the longest first, at most MAX_PREFIX_MATCHES."""
        if not keys:
            return []
        flat = await self._runner.run("find_prefix", MAX_PREFIX_MATCHES, *keys)
        return [_match(*flat[begin : begin + 5]) for begin in range(0, len(flat), 5)]

    async def state(self) -> StoreState:
        """All live workers and counts."""
        reply = await self._runner.run("state")
        (incarnation, log, revision, num_requests, num_prefix_keys, recovering), workers = (
            reply[:6],
            reply[6:],
        )
        infos = [WorkerInfo.FromString(worker) for worker in workers]
        infos.sort(key=lambda info: info.worker_id)
        return StoreState(
            incarnation.decode(),
            log.decode(),
            revision,
            infos,
            num_requests,
            num_prefix_keys,
            bool(recovering),
        )

    async def changes(self, log: str, revision: int) -> Changes | None:
        """What follows `revision` of a log; None when it cannot be had without a gap: take the state anew."""
        reply = await self._runner.run("changes", log, revision, CHANGES_PER_SCRIPT)
        if reply is None:
            return None
        recovering, *flat = reply
        return Changes([_change(kind, value) for kind, value in pairs(flat)], bool(recovering))

    async def expire(self) -> Expired:
        """Ends leases that are over and what was told under them, at most EXPIRIES_PER_SCRIPT of each kind.

        For one TTL after Redis was away nothing ends: renewals were answered DEGRADED meanwhile.
        """
        num_failures = self._runner.num_failures
        was_away = int(num_failures != self._num_failures_told)
        expired = Expired(*await self._runner.run("expire", EXPIRIES_PER_SCRIPT, was_away))
        self._num_failures_told = num_failures
        return expired

    async def close(self) -> None:
        """Closes the connections to Redis."""
        await self._runner.close()

    async def _tell(
        self, script: str, holder: PrefixHolder, keys: Sequence[bytes]
    ) -> "LeaseStatus.ValueType":
        status: LeaseStatus.ValueType = await self._runner.run(
            *(script, holder.worker_id, holder.process_incarnation, holder.epoch),
            *(layout_bytes(holder.attention), *keys),
        )
        return status


def _check_holder(status: "LeaseStatus.ValueType", holder: PrefixHolder) -> None:
    if status == LeaseStatus.LEASE_STATUS_NOT_FOUND:
        raise NotFound("UNKNOWN_WORKER", f"no lease for worker {holder.worker_id!r} under this epoch")
    if status == LeaseStatus.LEASE_STATUS_STALE:
        raise Aborted(
            "STALE_EPOCH", f"worker {holder.worker_id!r} is in a newer incarnation or epoch than this one"
        )


def _admission_result(status: int, other: bytes) -> AdmissionResult:
    return AdmissionResult(
        status=AdmissionStatus.ValueType(status), other=RequestAdmission.FromString(other) if other else None
    )


def _match(worker_id: bytes, incarnation: bytes, epoch: bytes, layout: bytes, num_keys: int) -> PrefixMatch:
    holder = PrefixHolder(
        worker_id=worker_id.decode(),
        process_incarnation=incarnation.decode(),
        epoch=int(epoch),
        attention=AttentionLayout.FromString(layout),
    )
    return PrefixMatch(holder=holder, num_keys=num_keys)


def _change(kind: bytes, value: bytes) -> WorkerChange:
    if kind == b"removed":
        return WorkerChange(updated=None, removed=value.decode())
    return WorkerChange(updated=WorkerInfo.FromString(value), removed=None)
