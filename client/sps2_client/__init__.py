"""The SDK: `Client`, `AsyncClient`, what they return and what they raise. Imports only the wire.

from sps2_client import Client

with Client("127.0.0.1:50051") as client:
    with client.stream(prompt="Once upon a time", max_tokens=64) as stream:
        for event in stream:
            ...
    print(stream.text, stream.usage)
"""

from sps2_client._async_client import AsyncClient
from sps2_client._async_stream import AsyncStream
from sps2_client._client import Client
from sps2_client._credentials import TLS, Token
from sps2_client._errors import (
    Aborted,
    AlreadyExists,
    BetweenTokensTimeout,
    Cancelled,
    ConnectionFailed,
    ConnectionLost,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    FieldViolation,
    FirstTokenTimeout,
    InvalidArgument,
    NotFound,
    OutOfRange,
    PermissionDenied,
    ProtocolError,
    Received,
    ResourceExhausted,
    ServerBug,
    SPS2Error,
    StatusError,
    Timeout,
    TotalTimeout,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from sps2_client._options import Timeouts
from sps2_client._requests import ChatMessage, GenerationOptions
from sps2_client._stream import Stream
from sps2_client._types import (
    BytesMoved,
    Choice,
    ClusterChange,
    ClusterState,
    Event,
    Finished,
    FinishReason,
    Generation,
    Model,
    Progress,
    Resized,
    TextDelta,
    Timings,
    TokenLogprob,
    Usage,
    UsageReport,
    Worker,
)

__all__ = [
    "TLS",
    "Aborted",
    "AlreadyExists",
    "AsyncClient",
    "AsyncStream",
    "BetweenTokensTimeout",
    "BytesMoved",
    "Cancelled",
    "ChatMessage",
    "Choice",
    "Client",
    "ClusterChange",
    "ClusterState",
    "ConnectionFailed",
    "ConnectionLost",
    "DataLoss",
    "DeadlineExceeded",
    "Event",
    "FailedPrecondition",
    "FieldViolation",
    "FinishReason",
    "Finished",
    "FirstTokenTimeout",
    "Generation",
    "GenerationOptions",
    "InvalidArgument",
    "Model",
    "NotFound",
    "OutOfRange",
    "PermissionDenied",
    "Progress",
    "ProtocolError",
    "Received",
    "Resized",
    "ResourceExhausted",
    "SPS2Error",
    "ServerBug",
    "StatusError",
    "Stream",
    "TextDelta",
    "Timeout",
    "Timeouts",
    "Timings",
    "Token",
    "TokenLogprob",
    "TotalTimeout",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Usage",
    "UsageReport",
    "Worker",
]
