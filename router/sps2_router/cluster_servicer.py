"""ClusterService on the wire: the router's view of the cluster, for operators."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from sps2.v1 import cluster_service_pb2 as pb
from sps2_router.admission import Admission
from sps2_router.channels import LeaderChannels
from sps2_router.cluster_watch import watch_cluster
from sps2_router.drains import drain_group
from sps2_router.prompt_queue import PromptQueue
from sps2_router.resizes import resize_request
from sps2_router.scheduler import Scheduler, WorkersView

Context = grpc.aio.ServicerContext[Any, Any]


class ClusterServicer:
    """Serves sps2.v1.ClusterService."""

    def __init__(
        self,
        view: WorkersView,
        admission: Admission,
        queue: PromptQueue,
        scheduler: Scheduler,
        channels: LeaderChannels,
    ) -> None:
        self._view = view
        self._channels = channels
        self._admission = admission
        self._queue = queue
        self._scheduler = scheduler

    async def GetClusterState(self, _: pb.GetClusterStateRequest, __: Context) -> pb.GetClusterStateResponse:  # noqa: N802
        """See cluster_service.proto."""
        workers = self._view.workers
        return pb.GetClusterStateResponse(
            workers=[workers[worker_id] for worker_id in sorted(workers)],
            directory_connected=self._view.connected,
            num_requests_live=self._admission.num_live,
            num_requests_by_group=self._scheduler.num_requests_by_group,
            num_queued_tokens=self._queue.num_tokens,
        )

    async def WatchClusterState(  # noqa: N802
        self, _: pb.WatchClusterStateRequest, __: Context
    ) -> AsyncIterator[pb.WatchClusterStateResponse]:
        """See cluster_service.proto."""
        async with aclosing(watch_cluster(self._view, lambda: self._admission.num_live)) as changes:
            async for change in changes:
                yield change

    async def ResizeRequest(self, request: pb.ResizeRequestRequest, _: Context) -> pb.ResizeRequestResponse:  # noqa: N802
        """See cluster_service.proto."""
        return await resize_request(self._view.workers, self._channels, request)

    async def DrainGroup(self, request: pb.DrainGroupRequest, _: Context) -> pb.DrainGroupResponse:  # noqa: N802
        """See cluster_service.proto."""
        return await drain_group(self._view.workers, self._channels, request)
