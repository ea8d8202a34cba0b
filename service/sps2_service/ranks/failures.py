"""What a group's leader answers for an attempt that failed in an engine, for a fenced rank, and while it drains."""

from sps2.internal.v1 import engine_pb2
from sps2_service.errors import GROUP_DRAINING, DataLoss, Internal, ServiceError, Unavailable

FENCED = "FENCED"
"""Reason of what a rank refuses because its lease does not hold; engines give it, too."""

_NOT_RETRYABLE: dict[str, type[ServiceError]] = {
    "NON_FINITE_LOGITS": Internal,
    "DATA_LOSS": DataLoss,
    "KV_CHECKSUM": DataLoss,
}


def attempt_failure(failed: engine_pb2.AttemptFailed, group: str) -> ServiceError:
    """UNAVAILABLE, so that the router tries again, unless trying again is known not to help."""
    if failed.reason == FENCED:
        return fenced(group, failed.message)
    make = _NOT_RETRYABLE.get(failed.reason, Unavailable)
    return make(failed.reason, failed.message, metadata={"component": group})


def fenced(group: str, why: str) -> Unavailable:
    """What a group answers of which a rank is fenced, be it the leader or a follower: no failure, come again."""
    return Unavailable(FENCED, why, retry_after=1.0, metadata={"component": group})


def group_draining(group: str) -> Unavailable:
    """What a group that is leaving answers, and what ends the calls that it hands back."""
    return Unavailable(
        GROUP_DRAINING,
        f"group {group} is draining: another one takes it, if there is one",
        retry_after=1.0,
        metadata={"component": group},
    )
