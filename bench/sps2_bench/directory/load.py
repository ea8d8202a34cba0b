"""What a large deployment asks of the directory: heartbeats, records, lookups. Plain calls, no retries."""

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import grpc

from sps2.internal.v1 import kv_directory_service_pb2 as pb
from sps2.internal.v1.kv_directory_service_pb2_grpc import KvDirectoryServiceStub
from sps2.internal.v1.placement_pb2 import Attempt, AttentionLayout, ExactMask
from sps2.v1 import cluster_pb2

CHAIN_KEYS = 64
HOLDERS = 4
"""Workers that hold a chain, or a part of it."""
REQUEST_LEASE_S = 3600.0
TIMEOUT_S = 30.0
FILL_TASKS = 32

T = TypeVar("T")
Call = Callable[[], Awaitable[object]]


@dataclass
class Latencies:
    """Seconds that calls took, and over how long they were made."""

    seconds: list[float] = field(default_factory=list)
    over_s: float = 0.0

    def quantile(self, share: float) -> float:
        """Seconds within which that share of calls was answered."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    @property
    def per_s(self) -> float:
        """Calls in a second."""
        return len(self.seconds) / self.over_s


class DirectoryLoad:
    """One directory's callers. Made inside a running event loop."""

    def __init__(
        self, channel: grpc.aio.Channel, num_workers: int, group_size: int, num_requests: int, num_chains: int
    ) -> None:
        self._stub = KvDirectoryServiceStub(channel)
        self._group_size = group_size
        self.workers = [_worker(index, group_size) for index in range(num_workers)]
        self._num_requests = num_requests
        self._chains = [[_key(chain, block) for block in range(CHAIN_KEYS)] for chain in range(num_chains)]
        self._random = random.Random(7)
        self.interval_s = 1.0
        self.ttl_s = 0.0

    async def fill(self) -> None:
        """Registers the workers, records the requests and the prefixes."""
        replies = await _all(partial(self._register, worker) for worker in self.workers)
        self.interval_s, self.ttl_s = replies[0].renew_interval_s, replies[0].lease_ttl_s
        renewing = asyncio.create_task(self.renew(self.workers))
        try:
            await _all(partial(self._record, index) for index in range(self._num_requests))
            for chain in range(len(self._chains)):
                for holder in range(HOLDERS):
                    await self._tell(chain, holder)
        finally:
            renewing.cancel()

    async def renew(self, workers: Sequence[cluster_pb2.WorkerInfo]) -> None:
        """Sends each group's heartbeat, which renews for its ranks, at its own time, until cancelled."""
        began, groups = time.monotonic(), _groups(workers, self._group_size)
        async with asyncio.TaskGroup() as calls:
            for beat in itertools.count():
                await asyncio.sleep(began + beat * self.interval_s / len(groups) - time.monotonic())
                calls.create_task(self._renew(groups[beat % len(groups)], beat))

    async def closed_loop(self, call: Call, num_tasks: int, duration_s: float) -> Latencies:
        """So many callers, each with one call under way."""
        result, began = Latencies(), time.monotonic()

        async def caller() -> None:
            while (sent := time.monotonic()) < began + duration_s:
                await call()
                result.seconds.append(time.monotonic() - sent)

        await asyncio.gather(*(caller() for _ in range(num_tasks)))
        result.over_s = time.monotonic() - began
        return result

    async def open_loop(self, call: Call, per_s: float, duration_s: float) -> Latencies:
        """Calls at fixed times, whatever became of those before; counted from when they were due."""
        result, began = Latencies(), time.monotonic()

        async def one(due: float) -> None:
            await call()
            result.seconds.append(time.monotonic() - due)

        async with asyncio.TaskGroup() as calls:
            for index in range(int(per_s * duration_s)):
                due = began + index / per_s
                await asyncio.sleep(due - time.monotonic())
                calls.create_task(one(due))
        result.over_s = time.monotonic() - began
        return result

    async def lookup(self) -> None:
        """A chain that four workers hold, a part each."""
        chain = self._random.choice(self._chains)
        reply = await self._stub.FindPrefix(pb.FindPrefixRequest(keys=chain), timeout=TIMEOUT_S)
        assert reply.matches[0].num_keys == CHAIN_KEYS

    async def unary(self) -> None:
        """One of the calls of a request's life, or a look at it."""
        index = self._random.randrange(self._num_requests)
        if self._random.random() < 0.5:
            await self._record(index)
        else:
            request = pb.LocateRequestRequest(request_id=_request_id(index))
            await self._stub.LocateRequest(request, timeout=TIMEOUT_S)

    async def expiries(self, num_lost: int) -> list[float]:
        """Seconds from the last heartbeat of each of the first workers to the news that it is gone."""
        lost = {worker.worker_id: 0.0 for worker in self.workers[:num_lost]}
        watch = self._stub.WatchWorkers(pb.WatchWorkersRequest(), timeout=self.ttl_s + TIMEOUT_S)
        await watch.read()  # the snapshot
        for worker in self.workers[:num_lost]:
            lost[worker.worker_id] = time.monotonic()
            await self._renew([worker], 0)
        waits: list[float] = []
        renewing = asyncio.create_task(self.renew(self.workers[num_lost:]))
        try:
            while len(waits) < num_lost:
                response = await watch.read()
                assert isinstance(response, pb.WatchWorkersResponse), "the directory ended the watch"
                if response.removed_worker_id in lost:
                    waits.append(time.monotonic() - lost.pop(response.removed_worker_id))
        finally:
            renewing.cancel()
            watch.cancel()
        return waits

    async def _register(self, worker: cluster_pb2.WorkerInfo) -> pb.RegisterWorkerResponse:
        return await self._stub.RegisterWorker(pb.RegisterWorkerRequest(worker=worker), timeout=TIMEOUT_S)

    async def _renew(self, group: Sequence[cluster_pb2.WorkerInfo], beat: int) -> None:
        load = cluster_pb2.WorkerLoad(num_requests_running=beat % 100, steps_done=beat)
        renewals = [
            pb.LeaseRenewal(
                worker_id=worker.worker_id,
                process_incarnation=worker.process_incarnation,
                state=worker.state,
                epoch=worker.epoch,
                load=load,
                transfer_address=worker.transfer_address,
            )
            for worker in group
        ]
        reply = await self._stub.RenewLease(pb.RenewLeaseRequest(renewals=renewals), timeout=TIMEOUT_S)
        assert list(reply.statuses) == [pb.LEASE_STATUS_RENEWED] * len(renewals)

    async def _record(self, index: int) -> None:
        worker = self.workers[index % len(self.workers)]
        record = pb.RequestRecord(
            attempt=Attempt(request_id=_request_id(index), number=1), decode_group=worker.group
        )
        for rank in range(2):
            record.shards.add(
                worker_id=worker.worker_id,
                epoch=worker.epoch,
                layer_end=32,
                token_begin=4096 * rank,
                token_end=4096 * (rank + 1),
                num_blocks=64,
            )
        request = pb.RecordShardsRequest(record=record, lease_s=REQUEST_LEASE_S)
        await self._stub.RecordShards(request, timeout=TIMEOUT_S)

    async def _tell(self, chain: int, holder: int) -> None:
        worker = self.workers[(HOLDERS * chain + holder) % len(self.workers)]
        told = pb.RecordPrefixRequest(
            holder=pb.PrefixHolder(
                worker_id=worker.worker_id,
                process_incarnation=worker.process_incarnation,
                epoch=worker.epoch,
                attention=AttentionLayout(exact=ExactMask()),
            ),
            keys=self._chains[chain][: CHAIN_KEYS >> holder],
        )
        await self._stub.RecordPrefix(told, timeout=TIMEOUT_S)


async def _all(calls: Iterable[Callable[[], Awaitable[T]]]) -> list[T]:
    """Makes the calls, FILL_TASKS at a time."""
    replies: list[T] = []
    remaining = iter(calls)

    async def caller() -> None:
        for call in remaining:  # shared: each caller takes the next
            reply = await call()
            replies.append(reply)

    await asyncio.gather(*(caller() for _ in range(FILL_TASKS)))
    return replies


def _groups(workers: Sequence[cluster_pb2.WorkerInfo], size: int) -> list[Sequence[cluster_pb2.WorkerInfo]]:
    return [workers[begin : begin + size] for begin in range(0, len(workers), size)]


def _worker(index: int, group_size: int) -> cluster_pb2.WorkerInfo:
    group, rank = divmod(index, group_size)
    return cluster_pb2.WorkerInfo(
        worker_id=f"decode-{group}/{rank}",
        role=cluster_pb2.WORKER_ROLE_DECODE,
        group=f"decode-{group}",
        rank=rank,
        group_size=group_size,
        epoch=1_700_000_000_000_000 + index,
        process_incarnation=f"{index:032x}",
        grpc_address=f"10.0.{index // 250}.{index % 250}:50080",
        transfer_address=f"10.0.{index // 250}.{index % 250}:50081",
        state=cluster_pb2.WORKER_STATE_READY,
    )


def _request_id(index: int) -> str:
    return f"request-{index:08d}"


def _key(chain: int, block: int) -> bytes:
    return chain.to_bytes(16, "big") + block.to_bytes(16, "big")
