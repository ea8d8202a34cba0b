"""Server interceptor: requests are parsed and exceptions become statuses in this one place.

Servicers stay ordinary `async def Method(self, request, context)` methods (or async generators, for streamed
responses) and raise ServiceError. What gRPC would do by itself is worse: malformed bytes and exceptions come
out as UNKNOWN with the exception's text, which is ours to read and nobody else's.
"""

import asyncio
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeAlias, cast

import grpc
import structlog
from google.protobuf.message import DecodeError

from sps2_service.errors import Internal, InvalidArgument, ServiceError, Unimplemented
from sps2_service.status import to_grpc_status

Context = grpc.aio.ServicerContext[Any, Any]
Deserializer = Callable[[bytes], Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation: TypeAlias = Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]]

# There is one retry owner, the router. This trailer stops a retryPolicy in some client's service config.
NO_RETRY = (("grpc-retry-pushback-ms", "-1"),)

log = structlog.get_logger(__name__)


class StatusInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg] # generic in the stubs only
    """Parses inside the handler and turns every exception into a rich status.

    - bytes that are no valid message (also invalid UTF-8, or nested too deeply): INVALID_ARGUMENT
      `MALFORMED_REQUEST`; a method that does not exist: UNIMPLEMENTED `UNKNOWN_METHOD`
    - ServiceError, also from an inner interceptor: as it is
    - anything else: INTERNAL `INTERNAL` with a fixed text; the traceback goes to the log
    - cancellation by the client, by its deadline or by a stopping server: passed on, so that `finally` runs

    A servicer with streamed requests reads them from its request iterator; `context.read()` gives raw bytes.
    """

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler:
        """Called by gRPC once for each call."""
        method = handler_call_details.method
        try:
            handler = await continuation(handler_call_details)
        except ServiceError as error:
            return _refusal(method, error)
        if handler is None:
            return _refusal(method, Unimplemented("UNKNOWN_METHOD", f"no method {method!r} here"))
        return wrap_handler(handler, method)


def wrap_handler(handler: Handler, method: str) -> Handler:
    """The same handler, with parsing and errors as StatusInterceptor says; `method` is for the log."""
    parse = handler.request_deserializer or _identity
    behavior, make = _behavior_and_factory(handler)

    async def call(raw: Any, context: Context) -> Any:
        try:
            request = _parsed_stream(parse, raw) if handler.request_streaming else _parsed(parse, raw)
            result = behavior(request, context)
            if not inspect.isasyncgen(result):
                return await result
            await _relay(cast("AsyncGenerator[Any, Any]", result), context)
        except asyncio.CancelledError:
            _reraise_if_ours(context)
            log.exception("a part of the call was cancelled, the call was not", method=method)
            await _abort(context, _unexpected())
        except grpc.aio.AbortError:
            raise  # the servicer aborted the call itself; its status is already on its way
        except ServiceError as error:
            log.info("refused", method=method, code=error.code.name, reason=error.reason)
            await _abort(context, error)
        except Exception as error:
            if context.cancelled() or context.done():
                log.debug("the call had ended already", method=method, error=type(error).__name__)
                raise asyncio.CancelledError from error
            log.exception("handler failed", method=method)
            await _abort(context, _unexpected())

    return make(call, request_deserializer=None, response_serializer=handler.response_serializer)


def guarded(handler: Handler, check: Callable[[Context], None]) -> Handler:
    """The same handler behind a check, which runs in the call's own task and may raise ServiceError."""
    behavior, make = _behavior_and_factory(handler)

    def checked(request: Any, context: Context) -> Any:
        check(context)
        return behavior(request, context)

    return make(
        checked,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


async def _relay(responses: AsyncGenerator[Any, Any], context: Context) -> None:
    # Written from here instead of yielded to gRPC: when the call is cancelled in the middle of a write, the
    # servicer's generator is closed now, and not when the garbage collector gets to it.
    async with aclosing(responses):
        async for response in responses:
            await context.write(response)


def _reraise_if_ours(context: Context) -> None:
    """Re-raises the current CancelledError if the call itself is cancelled, and not something it awaited."""
    task = asyncio.current_task()
    if context.cancelled() or context.done() or (task is not None and task.cancelling() > 0):
        raise  # noqa: PLE0704 - called from an except block only


async def _abort(context: Context, error: ServiceError) -> None:
    status = to_grpc_status(error)
    await context.abort(status.code, status.details or "", (*(status.trailing_metadata or ()), *NO_RETRY))


def _unexpected() -> Internal:
    return Internal("INTERNAL", "the service failed on this call; its log has the details")


def _identity(raw: bytes) -> bytes:
    return raw


def _parsed(parse: Deserializer, raw: bytes) -> Any:
    try:
        return parse(raw)
    except DecodeError:
        raise InvalidArgument(
            "MALFORMED_REQUEST",
            "the request is no valid protobuf message of its type: check its bytes, UTF-8 and nesting",
        ) from None


async def _parsed_stream(parse: Deserializer, raws: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    async for raw in raws:
        yield _parsed(parse, raw)


def _behavior_and_factory(handler: Handler) -> tuple[Any, Callable[..., Handler]]:
    if handler.request_streaming and handler.response_streaming:
        return handler.stream_stream, grpc.stream_stream_rpc_method_handler
    if handler.request_streaming:
        return handler.stream_unary, grpc.stream_unary_rpc_method_handler
    if handler.response_streaming:
        return handler.unary_stream, grpc.unary_stream_rpc_method_handler
    return handler.unary_unary, grpc.unary_unary_rpc_method_handler


def _refusal(method: str, error: ServiceError) -> Handler:
    """A handler that fails; it takes part in calls of every kind, since it neither reads nor writes."""

    async def refuse(_: Any, context: Context) -> None:
        raise error

    return wrap_handler(grpc.stream_stream_rpc_method_handler(refuse), method)
