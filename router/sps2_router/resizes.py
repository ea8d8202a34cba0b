"""A resize of a live request: the decode leader that serves it is found by asking them, for there are few."""

from collections.abc import Mapping
from typing import Any

import grpc

from sps2.internal.v1 import decode_service_pb2, decode_service_pb2_grpc
from sps2.v1 import cluster_pb2
from sps2.v1 import cluster_service_pb2 as pb
from sps2_router.channels import LeaderChannels
from sps2_router.worker_errors import worker_error
from sps2_service.errors import NotFound
from sps2_service.request_fields import check_request_id

RESIZE_TIMEOUT_S = 65.0
"""A little longer than a leader takes at most."""


async def resize_request(
    workers: Mapping[str, cluster_pb2.WorkerInfo], channels: LeaderChannels, request: pb.ResizeRequestRequest
) -> pb.ResizeRequestResponse:
    """Has it done and says what was done.

    Raises:
        ServiceError: as cluster_service.proto has it.
    """
    check_request_id(request.request_id, "request_id")
    for worker in workers.values():
        if worker.role == cluster_pb2.WORKER_ROLE_DECODE and worker.rank == 0 and worker.grpc_address:
            try:
                return await _ask(worker, channels, request)
            except NotFound:
                continue
    raise NotFound("UNKNOWN_REQUEST", f"no request {request.request_id!r} decodes")


async def _ask(
    leader: cluster_pb2.WorkerInfo, channels: LeaderChannels, request: pb.ResizeRequestRequest
) -> pb.ResizeRequestResponse:
    message = decode_service_pb2.ResizeAttemptRequest(
        request_id=request.request_id, degree=request.degree, ranks=request.ranks
    )
    async with channels.use(leader.grpc_address) as channel:
        stub: Any = decode_service_pb2_grpc.DecodeServiceStub(channel)
        try:
            done = await stub.ResizeAttempt(message, timeout=RESIZE_TIMEOUT_S)
        except grpc.RpcError as error:
            raise worker_error(error, leader) from None
    return pb.ResizeRequestResponse(
        group=done.group,
        home=done.home,
        holders=done.holders,
        num_blocks_moved=done.num_blocks_moved,
        longest_gap_s=done.longest_gap_s,
        median_gap_s=done.median_gap_s,
    )
