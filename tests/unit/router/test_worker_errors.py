"""What a failed call to a worker means to the router."""

import grpc
import pytest

from sps2.v1 import cluster_pb2
from sps2_router.worker_errors import WORKER_LOST, worker_error
from sps2_service.errors import Internal, Unavailable
from sps2_service.status import to_grpc_status

Code = grpc.StatusCode
LEADER = cluster_pb2.WorkerInfo(worker_id="decode-0/0", grpc_address="127.0.0.1:1")
PREEMPTED = Unavailable("PREEMPTED", "room given away", retry_after=0.25)


def ended(code: grpc.StatusCode, details: str, trailers: tuple[tuple[str, bytes], ...] = ()) -> grpc.RpcError:
    none = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, none, grpc.aio.Metadata(*trailers), details=details)


@pytest.mark.parametrize(
    ("code", "write_failed"), [(Code.UNAVAILABLE, False), (Code.CANCELLED, False), (Code.INTERNAL, True)]
)
def test_a_call_that_was_cut_is_a_lost_worker(code: grpc.StatusCode, *, write_failed: bool) -> None:
    """Whatever grpc says about it in words."""
    error = worker_error(ended(code, "anything"), LEADER, write_failed=write_failed)
    assert (error.code, error.reason, error.metadata["component"]) == (
        Code.UNAVAILABLE,
        WORKER_LOST,
        "decode-0/0",
    )


def test_an_internal_error_that_no_write_explains_is_a_bug() -> None:
    error = worker_error(ended(Code.INTERNAL, "Internal error from Core"), LEADER)
    assert isinstance(error, Internal)
    assert error.reason == "WORKER_BUG"


@pytest.mark.parametrize("write_failed", [False, True])
def test_a_workers_own_word_counts(*, write_failed: bool) -> None:
    status = to_grpc_status(PREEMPTED)
    trailers = tuple(status.trailing_metadata)
    error = worker_error(ended(status.code, status.details, trailers), LEADER, write_failed=write_failed)
    assert (error.reason, error.retry_after) == ("PREEMPTED", 0.25)
