"""What a failed call to a worker means: the worker's own typed error, or the loss of the worker."""

import grpc

from sps2.v1 import cluster_pb2
from sps2_service.errors import Cancelled, DeadlineExceeded, Internal, ServiceError, Unavailable
from sps2_service.status import from_rpc_error

WORKER_LOST = "WORKER_LOST"
"""Reason of a call whose connection is gone or was never made."""


def worker_error(
    error: grpc.RpcError, worker: cluster_pb2.WorkerInfo, *, write_failed: bool = False
) -> ServiceError:
    """The error to act on when a call to `worker` failed.

    The worker's own errors pass through with reason and metadata: it knows best what died. A status that
    gRPC made has no reason of its own; then the connection is gone, and the error names the worker.

    Args:
        error: What reading from the call raised.
        worker: The other end.
        write_failed: Whether a write to the call has failed: it ended under our hands, and grpc.aio may have put an
            INTERNAL of its own in place of how it ended.
    """
    found = from_rpc_error(error)
    bare = found.reason == found.code.name
    # A call that we did not cancel was cancelled by a server that went away.
    is_cut = isinstance(found, Unavailable) or (write_failed and isinstance(found, Internal))
    if isinstance(found, Cancelled) or (bare and is_cut):
        return worker_lost(worker, found.message)
    if bare and isinstance(found, DeadlineExceeded):
        return DeadlineExceeded(
            "DEADLINE_EXCEEDED", f"the request's time was over while {worker.worker_id} worked on it"
        )
    if bare:
        return Internal("WORKER_BUG", f"{worker.worker_id} answered {found.code.name}: {found.message}")
    return found


def worker_lost(worker: cluster_pb2.WorkerInfo, detail: str) -> Unavailable:
    """The connection to a worker is gone."""
    return Unavailable(
        WORKER_LOST,
        f"lost {worker.worker_id} at {worker.grpc_address}: {detail}",
        metadata={"component": worker.worker_id, "address": worker.grpc_address},
    )


def ended_early(worker: cluster_pb2.WorkerInfo, what: str) -> Internal:
    """A worker ended its stream OK without having said what it must say."""
    return Internal("ENDED_EARLY", f"{worker.worker_id} ended its stream before {what}")
