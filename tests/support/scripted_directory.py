"""A KV directory that answers as a test tells it."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from sps2.internal.v1 import kv_directory_service_pb2 as pb
from sps2.internal.v1.kv_directory_service_pb2_grpc import add_KvDirectoryServiceServicer_to_server
from sps2_service.directory_rpc import DirectoryOptions

OPTIONS = DirectoryOptions(
    timeout_s=0.5, first_snapshot_timeout_s=0.3, retry_min_s=0.01, retry_max_s=0.05, renew_interval_s=0.02
)


class ScriptedDirectory:
    """Answers renewals with `statuses` in turn, then RENEWED; each watch plays the next of `watches`."""

    def __init__(self) -> None:
        self.statuses: list[pb.LeaseStatus.ValueType] = []
        self.watches: list[list[pb.WatchWorkersResponse]] = []
        self.calls: list[str] = []
        self.states: list[int] = []
        self.refusals = 0
        self.renew_interval_s = OPTIONS.renew_interval_s
        self.recorded: list[str] = []
        self.renewed: list[list[str]] = []
        """The workers of each renewal."""

    @asynccontextmanager
    async def serving(self) -> AsyncGenerator[str]:
        """Serves on an address of its own."""
        server = grpc.aio.server()
        add_KvDirectoryServiceServicer_to_server(self, server)  # type: ignore[arg-type]
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            await server.stop(None)

    async def RegisterWorker(self, request: pb.RegisterWorkerRequest, context: Any) -> Any:  # noqa: N802
        if self.refusals > 0:
            self.refusals -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        self.calls.append("register")
        return pb.RegisterWorkerResponse(lease_ttl_s=5, renew_interval_s=self.renew_interval_s)

    async def RenewLease(self, request: pb.RenewLeaseRequest, _: Any) -> Any:  # noqa: N802
        status = self.statuses.pop(0) if self.statuses else pb.LEASE_STATUS_RENEWED
        self.calls.append(pb.LeaseStatus.Name(status).removeprefix("LEASE_STATUS_").lower())
        self.states.append(request.renewals[0].state)
        self.renewed.append([renewal.worker_id for renewal in request.renewals])
        return pb.RenewLeaseResponse(statuses=[status] * len(request.renewals))

    async def RecordShards(self, request: pb.RecordShardsRequest, _: Any) -> Any:  # noqa: N802
        self.recorded.append(request.record.attempt.request_id)
        return pb.RecordShardsResponse()

    async def ReleaseRequest(self, _: Any, __: Any) -> Any:  # noqa: N802
        return pb.ReleaseRequestResponse()

    async def WatchWorkers(self, _: Any, __: Any) -> AsyncIterator[pb.WatchWorkersResponse]:  # noqa: N802
        for response in self.watches.pop(0) if self.watches else []:
            yield response
        await asyncio.sleep(30)  # the client leaves first

    def __getattr__(self, name: str) -> None:
        """The methods that no test calls; the generated registration asks for all of them."""


async def until_calls(directory: ScriptedDirectory, count: int) -> list[str]:
    """The first so many calls, once there are as many."""
    async with asyncio.timeout(5):
        while len(directory.calls) < count:  # noqa: ASYNC110 - the calls come over the wire
            await asyncio.sleep(0.005)
    return directory.calls[:count]


async def end(task: "asyncio.Task[None]") -> None:
    """Ends a loop that a test has started."""
    task.cancel()
    await asyncio.wait([task], timeout=5)
