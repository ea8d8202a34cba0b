"""The one error tree of the services. Raised anywhere below a servicer, sent by `interceptors`.

    ServiceError
    ├── InvalidArgument      what the caller sent is wrong whatever the state; names the fields
    ├── OutOfRange           prompt + max_tokens over the context length
    ├── ResourceExhausted    a quota or a size limit of the caller's
    ├── Unavailable          not now, try again: queue full, draining, no ready group, no KV
    ├── FailedPrecondition   not until somebody changes something: more KV than the pool can ever hold
    ├── Aborted              a stale epoch or attempt
    ├── AlreadyExists        a live request has this id
    ├── NotFound             no such model or request
    ├── Unauthenticated      no valid credentials
    ├── PermissionDenied     valid credentials of somebody who may not
    ├── Unimplemented        no such method or feature
    ├── DeadlineExceeded     the caller's deadline, or a cap of ours
    ├── Cancelled            the caller gave up
    ├── DataLoss             KV failed its checksum after all retries
    └── Internal             a bug of ours, always

It knows nothing about the wire; `status` turns these into google.rpc.Status and back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Self

import grpc

PREEMPTED = "PREEMPTED"
"""Reason of an Unavailable that is no failure: the caller's room was given to an earlier request, for a while."""
GROUP_DRAINING = "GROUP_DRAINING"
"""Reason of an Unavailable that is no failure: the group is leaving; another may take the request, or go on with it."""


@dataclass(frozen=True)
class FieldViolation:
    """One wrong field of a request (google.rpc.BadRequest)."""

    field: str
    """Path from the request's root, as in the proto: `spec.sampling.top_p`."""
    description: str
    """What is wrong and what is allowed."""


@dataclass(frozen=True)
class QuotaViolation:
    """One quota that was hit (google.rpc.QuotaFailure)."""

    subject: str
    """Whose quota: `tenant:acme`, `queue`."""
    description: str
    """The limit and how to stay under it."""


class ServiceError(Exception):
    """An error that reaches the caller as it is: code, reason, message, details.

    Never holds prompt text, tokens or secrets: all of it goes to the caller, and to the log.
    """

    code: ClassVar[grpc.StatusCode]

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        violations: Sequence[FieldViolation] = (),
        quota: Sequence[QuotaViolation] = (),
        retry_after: float | None = None,
        metadata: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Builds the error; only subclasses are raised.

        Args:
            reason: UPPER_SNAKE, stable, for programs: `QUEUE_FULL`.
            message: For people: what happened and what to do about it.
            violations: The wrong fields, for InvalidArgument and OutOfRange.
            quota: The quotas that were hit, for ResourceExhausted and Unavailable.
            retry_after: Seconds after which a retry makes sense; None says nothing about retries.
            metadata: Facts for programs (ErrorInfo.metadata): `{"limit": "65536"}`.
        """
        super().__init__(reason, message)
        self.reason = reason
        self.message = message
        self.violations = tuple(violations)
        self.quota = tuple(quota)
        self.retry_after = retry_after
        self.metadata = dict(metadata)

    def __str__(self) -> str:
        return f"{self.code.name} {self.reason}: {self.message}"


class InvalidArgument(ServiceError):
    """What the caller sent is wrong, whatever the state of the system."""

    code = grpc.StatusCode.INVALID_ARGUMENT

    @classmethod
    def of_field(cls, field: str, description: str, reason: str = "INVALID_FIELD") -> Self:
        """The common case: one field is wrong."""
        return cls(reason, f"{field}: {description}", violations=[FieldViolation(field, description)])


class OutOfRange(ServiceError):
    """Valid as such, but past the end: prompt + max_tokens over the context length."""

    code = grpc.StatusCode.OUT_OF_RANGE


class ResourceExhausted(ServiceError):
    """A limit of this caller: message size, metadata size, tenant quota."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class Unavailable(ServiceError):
    """Not now; the same call may succeed later. Give `retry_after`."""

    code = grpc.StatusCode.UNAVAILABLE


class FailedPrecondition(ServiceError):
    """Not until something else changes; retrying alone does not help."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class Aborted(ServiceError):
    """Overtaken: the epoch or the attempt is stale."""

    code = grpc.StatusCode.ABORTED


class AlreadyExists(ServiceError):
    """A live request has this id."""

    code = grpc.StatusCode.ALREADY_EXISTS


class NotFound(ServiceError):
    """No such model, request or group here."""

    code = grpc.StatusCode.NOT_FOUND


class Unauthenticated(ServiceError):
    """Credentials are missing, unknown or expired."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(ServiceError):
    """Known caller, but not for this call."""

    code = grpc.StatusCode.PERMISSION_DENIED


class Unimplemented(ServiceError):
    """No such method, or a feature that this deployment lacks."""

    code = grpc.StatusCode.UNIMPLEMENTED


class DeadlineExceeded(ServiceError):
    """The caller's deadline passed, or a cap of ours."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(ServiceError):
    """The caller gave the call up."""

    code = grpc.StatusCode.CANCELLED


class DataLoss(ServiceError):
    """KV failed its checksum after all retries."""

    code = grpc.StatusCode.DATA_LOSS


class Internal(ServiceError):
    """A bug of ours."""

    code = grpc.StatusCode.INTERNAL


ERROR_OF_CODE: Mapping[grpc.StatusCode, type[ServiceError]] = MappingProxyType(
    {error.code: error for error in ServiceError.__subclasses__()}
)
"""The class for each status code; a code that has none (UNKNOWN) is a bug somewhere: Internal."""
