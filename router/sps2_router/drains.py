"""The drain of a group: its leader is asked, whatever state it is in."""

from collections.abc import Mapping
from typing import Any

import grpc

from sps2.internal.v1 import group_service_pb2, group_service_pb2_grpc
from sps2.v1 import cluster_pb2
from sps2.v1 import cluster_service_pb2 as pb
from sps2_router.channels import LeaderChannels
from sps2_router.types import group_workers
from sps2_router.worker_errors import worker_error
from sps2_service.errors import InvalidArgument, NotFound

ASK_TIMEOUT_S = 5.0
"""The leader answers at once, before it has drained."""


async def drain_group(
    workers: Mapping[str, cluster_pb2.WorkerInfo], channels: LeaderChannels, request: pb.DrainGroupRequest
) -> pb.DrainGroupResponse:
    """Has its leader begin.

    Raises:
        ServiceError: as cluster_service.proto has it.
    """
    if not request.group:
        raise InvalidArgument.of_field("group", "name a group, for example decode-0")
    groups = group_workers(workers.values())
    group = groups.get(request.group)
    if group is None or group.leader is None:
        known = ", ".join(name for name, one in groups.items() if one.leader is not None) or "none"
        raise NotFound(
            "UNKNOWN_GROUP", f"no group {request.group!r} with a leader is registered (there are: {known})"
        )
    message = group_service_pb2.DrainGroupRequest(group=request.group)
    async with channels.use(group.leader.grpc_address) as channel:
        stub: Any = group_service_pb2_grpc.GroupServiceStub(channel)
        try:
            begun = await stub.DrainGroup(message, timeout=ASK_TIMEOUT_S)
        except grpc.RpcError as error:
            raise worker_error(error, group.leader) from None
    return pb.DrainGroupResponse(budget_s=begun.budget_s)
