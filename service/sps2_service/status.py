"""ServiceError to google.rpc.Status and back (AIP-193: ErrorInfo, BadRequest, RetryInfo, QuotaFailure)."""

from typing import TypeVar, cast

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from sps2_service.errors import ERROR_OF_CODE, FieldViolation, Internal, QuotaViolation, ServiceError

M = TypeVar("M", bound=Message)

DOMAIN = "sps2"

# A status travels in trailers, and a client with default settings may drop trailers over 8 KiB together
# with all that they say. So what can grow is cut; by bytes, since gRPC escapes each non-ASCII one.
MAX_MESSAGE_BYTES = 512
MAX_VIOLATIONS = 8
MAX_QUOTA_VIOLATIONS = 2
MAX_FIELD_BYTES = 128
MAX_DESCRIPTION_BYTES = 192


def to_proto(error: ServiceError) -> status_pb2.Status:
    """The rich status of an error; long texts and lists are cut to fit into trailers."""
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    ]
    if error.violations:
        details.append(_bad_request(error))
    if error.quota:
        details.append(_quota_failure(error))
    if error.retry_after is not None:
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromNanoseconds(round(error.retry_after * 1e9))
        details.append(info)
    code: int = error.code.value[0]
    status = status_pb2.Status(code=code, message=_cut(error.message, MAX_MESSAGE_BYTES))
    for detail in details:
        status.details.add().Pack(detail)
    return status


def _bad_request(error: ServiceError) -> error_details_pb2.BadRequest:
    return error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(
                field=_cut(one.field, MAX_FIELD_BYTES),
                description=_cut(one.description, MAX_DESCRIPTION_BYTES),
            )
            for one in error.violations[:MAX_VIOLATIONS]
        ]
    )


def _quota_failure(error: ServiceError) -> error_details_pb2.QuotaFailure:
    return error_details_pb2.QuotaFailure(
        violations=[
            error_details_pb2.QuotaFailure.Violation(
                subject=_cut(one.subject, MAX_FIELD_BYTES),
                description=_cut(one.description, MAX_DESCRIPTION_BYTES),
            )
            for one in error.quota[:MAX_QUOTA_VIOLATIONS]
        ]
    )


def _cut(text: str, limit: int) -> str:
    """At most `limit` bytes of UTF-8; lone surrogates, which no wire carries, are replaced."""
    raw = text.encode(errors="replace")
    return raw.decode() if len(raw) <= limit else raw[: limit - 3].decode(errors="ignore") + "…"


def to_grpc_status(error: ServiceError) -> grpc.Status:
    """The same, ready for `context.abort_with_status`."""
    return rpc_status.to_status(to_proto(error))


def from_proto(status: status_pb2.Status) -> ServiceError:
    """The error that a rich status describes; details of unknown kinds are left out."""
    code = _code(status.code)
    info = _detail(status, error_details_pb2.ErrorInfo())
    retry = _detail(status, error_details_pb2.RetryInfo())
    request = _detail(status, error_details_pb2.BadRequest())
    quota = _detail(status, error_details_pb2.QuotaFailure())
    return ERROR_OF_CODE.get(code, Internal)(
        info.reason if info else code.name,
        status.message,
        violations=[FieldViolation(v.field, v.description) for v in request.field_violations]
        if request
        else (),
        quota=[QuotaViolation(v.subject, v.description) for v in quota.violations] if quota else (),
        retry_after=retry.retry_delay.ToNanoseconds() / 1e9 if retry else None,
        metadata=info.metadata if info else {},
    )


def _code(number: int) -> grpc.StatusCode:
    for code in grpc.StatusCode:
        if code.value[0] == number:
            return code
    return grpc.StatusCode.UNKNOWN


def _detail(status: status_pb2.Status, kind: M) -> M | None:
    for detail in status.details:
        if _unpack(detail, kind):
            return kind
    return None


def _unpack(detail: AnyMessage, kind: Message) -> bool:
    """False also for a detail that claims this kind and does not parse: code and message still count."""
    try:
        return detail.Unpack(kind)
    except DecodeError:
        return False


def from_rpc_error(error: grpc.RpcError) -> ServiceError:
    """The error of a failed call of ours to another service.

    A status that gRPC itself made (connection lost, deadline) has no details: its reason is the code's name.
    """
    call = cast("grpc.Call", error)  # every RpcError of a finished call is one
    try:
        status = rpc_status.from_call(call)
    except (ValueError, DecodeError):
        status = None  # details that contradict the call's own code, or do not parse, are not believed
    if status is not None:
        return from_proto(status)
    code = call.code()
    return ERROR_OF_CODE.get(code, Internal)(code.name, call.details() or code.name)
