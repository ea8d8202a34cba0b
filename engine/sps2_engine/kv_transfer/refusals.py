"""How the transfer server says no: google.rpc.Status with a reason and, where one is wrong, the field.

Engines do not import the services' error tree, so this is its small counterpart for gRPC's threaded server. Knows
nothing about slabs or rings.
"""

from collections.abc import Callable, Iterator
from typing import Any, Final, NoReturn, TypeVar

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

ERROR_DOMAIN: Final = "sps2"

R = TypeVar("R", bound=Message)


class Refusal(Exception):  # noqa: N818 - it says what happened
    """A call that is refused; `answer` sends it."""

    def __init__(self, code: grpc.StatusCode, reason: str, message: str, field: str = "") -> None:
        """`reason`: UPPER_SNAKE, for programs; `field`: path of the wrong field, where there is one."""
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.field = field

    @classmethod
    def of_field(cls, field: str, description: str) -> "Refusal":
        """One field is wrong, whatever the state of the target."""
        message = f"{field}: {description}"
        return cls(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", message, field)

    def answer(self, context: grpc.ServicerContext) -> NoReturn:
        """Ends the call with it."""
        details: list[Message] = [error_details_pb2.ErrorInfo(reason=self.reason, domain=ERROR_DOMAIN)]
        if self.field:
            violation = error_details_pb2.BadRequest.FieldViolation(
                field=self.field, description=self.message
            )
            details.append(error_details_pb2.BadRequest(field_violations=[violation]))
        status = status_pb2.Status(
            code=self.code.value[0], message=self.message, details=map(_packed, details)
        )
        context.abort_with_status(rpc_status.to_status(status))
        raise AssertionError("abort raises")


def parsed(message: type[R], raw: bytes) -> R:
    """What gRPC's own parsing would give, which answers INTERNAL to bytes that are no message.

    Raises:
        Refusal: they are none.
    """
    try:
        return message.FromString(raw)
    except DecodeError:
        raise Refusal(
            grpc.StatusCode.INVALID_ARGUMENT,
            "MALFORMED_REQUEST",
            "the request is no valid protobuf message of its type: check its bytes, UTF-8 and nesting",
        ) from None


def unary(
    request: type[R], method: Callable[[R, grpc.ServicerContext], Message]
) -> "grpc.RpcMethodHandler[Any, Any]":
    """A handler that parses inside and answers refusals."""

    def call(raw: bytes, context: grpc.ServicerContext) -> Message:
        try:
            return method(parsed(request, raw), context)
        except Refusal as refusal:
            refusal.answer(context)

    return grpc.unary_unary_rpc_method_handler(call, None, _serialized)


def streaming(
    request: type[R], method: Callable[[Iterator[R], grpc.ServicerContext], Iterator[Message]]
) -> "grpc.RpcMethodHandler[Any, Any]":
    """The same for streams both ways: what is refused ends the stream, after the answers to what came before."""

    def call(raws: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[Message]:
        try:
            yield from method((parsed(request, raw) for raw in raws), context)
        except Refusal as refusal:
            refusal.answer(context)

    return grpc.stream_stream_rpc_method_handler(call, None, _serialized)


def _packed(detail: Message) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(detail)
    return packed


def _serialized(message: Message) -> bytes:
    return message.SerializeToString()
