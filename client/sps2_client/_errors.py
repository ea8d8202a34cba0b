"""The one error tree of the SDK.

    SPS2Error
    ├── ConnectionFailed          no connection, or it broke before anything came (after all retries)
    ├── ConnectionLost            it broke in mid-stream; `received` holds what had come
    ├── Timeout
    │   ├── TotalTimeout          the whole call took longer than `Timeouts.total`
    │   ├── FirstTokenTimeout     nothing came within `Timeouts.first_token`
    │   └── BetweenTokensTimeout  nothing more came within `Timeouts.between_tokens`
    ├── ProtocolError             the stream broke the contract: no Finish, wrong index, count or digest
    └── StatusError               the service answered with an error status
        ├── InvalidArgument       the request is wrong; `field_violations` names the fields
        ├── OutOfRange            prompt and max_tokens exceed the context
        ├── ResourceExhausted     a quota or size limit of the caller
        ├── Unavailable           not now; `retry_after` says when to try again
        ├── FailedPrecondition    not until something else changes
        ├── Aborted               overtaken by a newer attempt
        ├── AlreadyExists         a live request has this id
        ├── NotFound              no such model or request
        ├── Unauthenticated       no valid credentials
        ├── PermissionDenied      not for this caller
        ├── Unimplemented         no such method or feature
        ├── DeadlineExceeded      a cap of the service passed (the caller's own deadline is TotalTimeout)
        ├── Cancelled             ended by CancelGeneration
        ├── DataLoss              KV failed its checksum after retries
        └── ServerBug             INTERNAL or UNKNOWN

It knows nothing about the wire; `_statuses` turns failed calls into these.
"""
# ruff: noqa: N818 - the names say what happened, as in httpx; "Error" adds nothing to `ConnectionLost`

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import grpc


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One wrong field of a request."""

    field: str
    """Path from the request's root, as in the proto: `spec.sampling.top_p`."""
    description: str
    """What is wrong."""


@dataclass(frozen=True, slots=True)
class Received:
    """What a stream had brought before it failed."""

    text: str = ""
    """Text so far."""
    token_ids: tuple[int, ...] = ()
    """Tokens so far."""
    more_choices: "tuple[Received, ...]" = ()
    """The same of choices 1, 2, ... of a request for several."""


class SPS2Error(Exception):
    """Anything that went wrong in a call.

    Attributes:
        message: For people.
        code: gRPC status; None when the SDK itself found the fault.
        reason: UPPER_SNAKE, stable, for programs ("QUEUE_FULL"); empty when nobody gave one.
        metadata: Facts for programs, for example the component that died.
        field_violations: The wrong fields of an InvalidArgument.
        retry_after: Seconds after which a retry makes sense; None when unknown.
        request_id: Id of the request; empty for calls that have none.
        received: Text and tokens that had come.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        reason: str = "",
        metadata: Mapping[str, str] = MappingProxyType({}),
        field_violations: Sequence[FieldViolation] = (),
        retry_after: float | None = None,
        request_id: str = "",
        received: Received = Received(),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.metadata = dict(metadata)
        self.field_violations = tuple(field_violations)
        self.retry_after = retry_after
        self.request_id = request_id
        self.received = received

    def __str__(self) -> str:
        known = (self.code.name if self.code else "", self.reason)
        # gRPC's own statuses have no reason of their own and would say the same word twice.
        head = " ".join(dict.fromkeys(word for word in known if word))
        return f"{head}: {self.message}" if head else self.message


class ConnectionFailed(SPS2Error):
    """No connection could be made, or it broke before anything came, and the retries are used up."""


class ConnectionLost(SPS2Error):
    """The connection broke in mid-stream; the answer is incomplete."""


class Timeout(SPS2Error):
    """A limit of `Timeouts` passed; the call was cancelled."""


class TotalTimeout(Timeout):
    """The whole call took longer than `Timeouts.total`."""


class FirstTokenTimeout(Timeout):
    """Nothing came within `Timeouts.first_token`."""


class BetweenTokensTimeout(Timeout):
    """Nothing more came within `Timeouts.between_tokens`."""


class ProtocolError(SPS2Error):
    """The stream broke the contract; never trust its text as complete.

    `reason` is one of MISSING_FINISH, MISSING_USAGE, SEQUENCE_GAP, UNKNOWN_CHOICE, TOKEN_INDEX, TOKEN_COUNT,
    DIGEST, EVENT_AFTER_FINISH, UNKNOWN_EVENT.
    """


class StatusError(SPS2Error):
    """The service answered with an error status."""


class InvalidArgument(StatusError):
    """The request is wrong whatever the state of the service."""


class OutOfRange(StatusError):
    """Prompt and max_tokens together exceed the context length."""


class ResourceExhausted(StatusError):
    """A quota or a size limit of the caller."""


class Unavailable(StatusError):
    """Not now: queue full, draining, no ready group, or a component died."""


class FailedPrecondition(StatusError):
    """Not until something else changes; a retry alone does not help."""


class Aborted(StatusError):
    """Overtaken by a newer attempt of the same request."""


class AlreadyExists(StatusError):
    """A live request has this id."""


class NotFound(StatusError):
    """No such model or request here."""


class Unauthenticated(StatusError):
    """Credentials are missing, unknown or expired."""


class PermissionDenied(StatusError):
    """A known caller, but not for this call."""


class Unimplemented(StatusError):
    """No such method, or a feature that this deployment lacks."""


class DeadlineExceeded(StatusError):
    """A time limit of the service passed."""


class Cancelled(StatusError):
    """Somebody cancelled the request."""


class DataLoss(StatusError):
    """KV failed its checksum after all retries."""


class ServerBug(StatusError):
    """INTERNAL or UNKNOWN: always a bug of the service."""
