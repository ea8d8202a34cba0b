"""Failed gRPC calls to errors of the SDK. Pure: it never sees a channel."""

from dataclasses import dataclass
from typing import TypeVar, cast

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from sps2_client import _errors as errors

M = TypeVar("M", bound=Message)

ERROR_OF_CODE: dict[grpc.StatusCode, type[errors.StatusError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidArgument,
    grpc.StatusCode.OUT_OF_RANGE: errors.OutOfRange,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.ResourceExhausted,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    grpc.StatusCode.FAILED_PRECONDITION: errors.FailedPrecondition,
    grpc.StatusCode.ABORTED: errors.Aborted,
    grpc.StatusCode.ALREADY_EXISTS: errors.AlreadyExists,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.UNIMPLEMENTED: errors.Unimplemented,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.CANCELLED: errors.Cancelled,
    grpc.StatusCode.DATA_LOSS: errors.DataLoss,
    grpc.StatusCode.INTERNAL: errors.ServerBug,
    grpc.StatusCode.UNKNOWN: errors.ServerBug,
}

DEADLINE_SLACK_S = 0.25
"""A deadline status this close to our own deadline is ours: the service sees the same one, a bit earlier."""


NOTHING = errors.Received()


@dataclass(frozen=True, slots=True)
class CallContext:
    """What the SDK knows of the call that failed."""

    started: bool
    """Whether an event had come."""
    time_left: float
    """Seconds to the call's own deadline."""
    address: str
    """Whom it was made to; a broken connection says nothing of it."""
    request_id: str = ""
    """Id of the request."""
    received: errors.Received = NOTHING
    """What had come."""


def from_rpc_error(error: grpc.RpcError, context: CallContext) -> errors.SPS2Error:
    """The SDK's error for a failed call.

    UNAVAILABLE without details is gRPC's own word for a broken connection; with details the service said it.
    """
    call = cast(
        "grpc.Call", error
    )  # every RpcError of a finished call is one, AioRpcError has the same methods
    code, text = call.code(), call.details() or ""
    status = _rich_status(call)
    if code is grpc.StatusCode.UNAVAILABLE and status is None:
        kind = errors.ConnectionLost if context.started else errors.ConnectionFailed
        verb = "lost the connection to" if context.started else "no connection to"
        return kind(
            f"{verb} the router at {context.address}: {text}",
            code=code,
            metadata={"component": "router", "address": context.address},
            request_id=context.request_id,
            received=context.received,
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and context.time_left <= DEADLINE_SLACK_S:
        message = "the total timeout passed"
        return errors.TotalTimeout(
            message, code=code, request_id=context.request_id, received=context.received
        )
    return _status_error(code, text, status, context)


def _status_error(
    code: grpc.StatusCode, text: str, status: status_pb2.Status | None, context: CallContext
) -> errors.StatusError:
    info = _detail(status, error_details_pb2.ErrorInfo())
    retry = _detail(status, error_details_pb2.RetryInfo())
    request = _detail(status, error_details_pb2.BadRequest())
    return ERROR_OF_CODE.get(code, errors.ServerBug)(
        text or code.name,
        code=code,
        reason=info.reason if info else "",
        metadata=dict(info.metadata) if info else {},
        field_violations=[errors.FieldViolation(v.field, v.description) for v in request.field_violations]
        if request
        else (),
        retry_after=retry.retry_delay.ToNanoseconds() / 1e9 if retry else None,
        request_id=context.request_id,
        received=context.received,
    )


def _rich_status(call: grpc.Call) -> status_pb2.Status | None:
    try:
        return cast("status_pb2.Status | None", rpc_status.from_call(call))
    except (ValueError, DecodeError):
        # Details that contradict the call's own code, or do not parse, are not believed; an empty status
        # still says that somebody answered, which a broken connection does not.
        return status_pb2.Status()


def _detail(status: status_pb2.Status | None, kind: M) -> M | None:
    for detail in status.details if status else ():
        if _unpack(detail, kind):
            return kind
    return None


def _unpack(detail: AnyMessage, kind: Message) -> bool:
    """False too for a detail that claims this kind but does not parse: code and message still count."""
    try:
        return detail.Unpack(kind)
    except DecodeError:
        return False
