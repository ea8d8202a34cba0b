"""KvDirectoryService: unpack, call, pack. Errors leave as ServiceError, which an interceptor sends."""

# ruff: noqa: N802 - the methods are named as in the proto

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from sps2.internal.v1 import kv_directory_service_pb2 as pb
from sps2_kv_directory.membership import Membership
from sps2_kv_directory.store import Store
from sps2_kv_directory.validation import (
    MAX_REQUEST_ID_CHARS,
    check_admissions,
    check_attempt,
    check_epoch,
    check_holder,
    check_id,
    check_prefix_keys,
    check_record,
    check_renewals,
    check_worker,
    request_lease_s,
)
from sps2_service.errors import Unavailable

Context = grpc.aio.ServicerContext[Any, Any]


class KvDirectoryServicer:
    """One replica's methods, as the proto describes them."""

    def __init__(
        self, store: Store, membership: Membership, *, lease_ttl_s: float, renew_interval_s: float
    ) -> None:
        self._store = store
        self._membership = membership
        self._lease_ttl_s = lease_ttl_s
        self._renew_interval_s = renew_interval_s

    async def RegisterWorker(
        self, request: pb.RegisterWorkerRequest, _: Context
    ) -> pb.RegisterWorkerResponse:
        """Grants a lease."""
        check_worker(request.worker)
        await self._store.register(request.worker)
        return pb.RegisterWorkerResponse(
            lease_ttl_s=self._lease_ttl_s, renew_interval_s=self._renew_interval_s
        )

    async def RenewLease(self, request: pb.RenewLeaseRequest, _: Context) -> pb.RenewLeaseResponse:
        """Renews leases; DEGRADED for all of them while the store is away: nobody is to fence for that."""
        check_renewals(request.renewals)
        try:
            statuses = await self._store.renew(request.renewals)
        except Unavailable:
            statuses = [pb.LEASE_STATUS_DEGRADED] * len(request.renewals)
        return pb.RenewLeaseResponse(statuses=statuses)

    async def DeregisterWorker(
        self, request: pb.DeregisterWorkerRequest, _: Context
    ) -> pb.DeregisterWorkerResponse:
        """Ends a lease."""
        check_id("worker_id", request.worker_id)
        check_id("process_incarnation", request.process_incarnation)
        await self._store.deregister(request.worker_id, request.process_incarnation)
        return pb.DeregisterWorkerResponse()

    async def DrawEpoch(self, request: pb.DrawEpochRequest, _: Context) -> pb.DrawEpochResponse:
        """Draws an epoch."""
        check_id("group", request.group)
        check_epoch("previous", request.previous)
        return pb.DrawEpochResponse(epoch=await self._store.draw_epoch(request.group, request.previous))

    async def WatchWorkers(
        self, _: pb.WatchWorkersRequest, __: Context
    ) -> AsyncIterator[pb.WatchWorkersResponse]:
        """A snapshot, then changes."""
        async with aclosing(self._membership.watch()) as responses:
            async for response in responses:
                yield response

    async def RecordShards(self, request: pb.RecordShardsRequest, _: Context) -> pb.RecordShardsResponse:
        """Records an attempt."""
        check_record(request.record)
        await self._store.record(request.record, request_lease_s(request.lease_s))
        return pb.RecordShardsResponse()

    async def LocateRequest(self, request: pb.LocateRequestRequest, _: Context) -> pb.LocateRequestResponse:
        """Finds the router that serves it, and its newest attempt."""
        check_id("request_id", request.request_id, MAX_REQUEST_ID_CHARS)
        return await self._store.locate(request.request_id)

    async def AdmitRequests(self, request: pb.AdmitRequestsRequest, _: Context) -> pb.AdmitRequestsResponse:
        """Tells which router serves which request."""
        check_admissions(request.admissions)
        results = await self._store.admit(request.admissions, request_lease_s(request.lease_s))
        return pb.AdmitRequestsResponse(results=results)

    async def DismissRequest(
        self, request: pb.DismissRequestRequest, _: Context
    ) -> pb.DismissRequestResponse:
        """Forgets an admission."""
        check_id("request_id", request.request_id, MAX_REQUEST_ID_CHARS)
        check_id("call_id", request.call_id)
        await self._store.dismiss(request.request_id, request.call_id)
        return pb.DismissRequestResponse()

    async def ReleaseRequest(
        self, request: pb.ReleaseRequestRequest, _: Context
    ) -> pb.ReleaseRequestResponse:
        """Forgets an attempt."""
        check_attempt("attempt", request.attempt)
        await self._store.release(request.attempt)
        return pb.ReleaseRequestResponse()

    async def RecordPrefix(self, request: pb.RecordPrefixRequest, _: Context) -> pb.RecordPrefixResponse:
        """Notes blocks that are held."""
        check_holder(request.holder)
        check_prefix_keys(request.keys)
        await self._store.record_prefix(request.holder, request.keys)
        return pb.RecordPrefixResponse()

    async def FindPrefix(self, request: pb.FindPrefixRequest, _: Context) -> pb.FindPrefixResponse:
        """Finds who holds a chain's beginning."""
        check_prefix_keys(request.keys)
        return pb.FindPrefixResponse(matches=await self._store.find_prefix(request.keys))

    async def EvictPrefix(self, request: pb.EvictPrefixRequest, _: Context) -> pb.EvictPrefixResponse:
        """Takes back blocks that were held."""
        check_holder(request.holder)
        check_prefix_keys(request.keys)
        await self._store.evict_prefix(request.holder, request.keys)
        return pb.EvictPrefixResponse()

    async def GetClusterState(self, _: pb.GetClusterStateRequest, __: Context) -> pb.GetClusterStateResponse:
        """Returns the store's state, not this replica's copy of it."""
        state = await self._store.state()
        return pb.GetClusterStateResponse(
            workers=state.workers,
            num_requests=state.num_requests,
            revision=state.revision,
            directory_incarnation=state.incarnation,
            recovering=state.recovering,
            num_prefix_keys=state.num_prefix_keys,
        )
