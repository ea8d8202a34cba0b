"""What an engine says of one attempt that failed -> the error that its caller gets."""

from sps2.internal.v1 import engine_pb2
from sps2_service.errors import DataLoss, Internal, ServiceError, Unavailable

_NOT_RETRYABLE: dict[str, type[ServiceError]] = {
    "NON_FINITE_LOGITS": Internal,
    "DATA_LOSS": DataLoss,
    "KV_CHECKSUM": DataLoss,
}


def attempt_failure(failed: engine_pb2.AttemptFailed, group: str) -> ServiceError:
    """UNAVAILABLE, so that the router tries again, unless trying again is known not to help."""
    make = _NOT_RETRYABLE.get(failed.reason, Unavailable)
    return make(failed.reason, failed.message, metadata={"component": group})
