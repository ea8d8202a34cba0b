"""What a caller sees of a handler's exceptions, over real loopback connections."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
import structlog

from sps2_service.channel import open_channel
from sps2_service.errors import FieldViolation, InvalidArgument, Unauthenticated, Unavailable
from sps2_service.server import ServiceServer
from sps2_service.status import from_rpc_error
from support.echo_service import SERVICE, Echo, EchoServicer, EchoStub

SECRET = "the user's secret prompt"


@asynccontextmanager
async def echo_service(
    on_call: Callable[[str], Any], **options: Any
) -> AsyncIterator[tuple[EchoStub, EchoServicer]]:
    server = ServiceServer(**options)
    servicer = EchoServicer(on_call)
    server.add(servicer, SERVICE)
    address = await server.start("127.0.0.1:0")
    try:
        async with open_channel(address) as channel:
            yield EchoStub(channel), servicer
    finally:
        await server.stop(0)


CALLS: list[Callable[[EchoStub, Any], Any]] = [
    lambda stub, request: stub.unary(request, timeout=5),
    lambda stub, request: read_all(stub.down(request, timeout=5)),
    lambda stub, request: stub.up(iter([request]), timeout=5),
    lambda stub, request: read_all(stub.both(iter([request]), timeout=5)),
]
IDS = ["unary", "down", "up", "both"]
each_kind = pytest.mark.parametrize("call", CALLS, ids=IDS)


async def read_all(call: Any) -> list[Any]:
    return [one async for one in call]


async def refused(awaitable: Any) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    return caught.value


async def test_all_kinds_of_calls_work() -> None:
    async with echo_service(str.upper) as (stub, _):
        assert (await stub.unary(Echo(text="a"))).text == "A"
        assert [one.text for one in await read_all(stub.down(Echo(text="a")))] == ["A", "A"]
        assert (await stub.up(iter([Echo(text="a"), Echo(text="b")]))).text == "A+B"
        assert [one.text for one in await read_all(stub.both(iter([Echo(text="a")] * 3)))] == ["A"] * 3


@each_kind
async def test_service_errors_arrive_with_their_details(call: Callable[[EchoStub, Any], Any]) -> None:
    def busy(_: str) -> str:
        raise Unavailable("QUEUE_FULL", "try later — soon", retry_after=0.25, metadata={"limit": "9"})

    async with echo_service(busy) as (stub, _):
        error = await refused(call(stub, Echo(text="x")))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "-1"
        arrived = from_rpc_error(error)
        assert isinstance(arrived, Unavailable)
        assert (arrived.reason, arrived.message) == ("QUEUE_FULL", "try later — soon")
        assert (arrived.retry_after, arrived.metadata) == (0.25, {"limit": "9"})


@each_kind
async def test_unknown_exceptions_tell_the_caller_nothing(call: Callable[[EchoStub, Any], Any]) -> None:
    def broken(_: str) -> str:
        raise KeyError(SECRET)

    async with echo_service(broken) as (stub, _):
        with structlog.testing.capture_logs() as lines:
            error = await refused(call(stub, Echo(text="x")))
        assert error.code() is grpc.StatusCode.INTERNAL
        assert from_rpc_error(error).reason == "INTERNAL"
        assert SECRET not in repr(error)
        assert [line["event"] for line in lines if line["log_level"] == "error"] == ["handler failed"]


def nested(depth: int) -> bytes:
    """A message within a message within ..., on the wire: field 2, length, content."""
    payload = b""
    for _ in range(depth):
        length, prefix = len(payload), bytearray(b"\x12")
        while length >= 0x80:
            prefix.append(length & 0x7F | 0x80)
            length >>= 7
        payload = bytes(prefix) + bytes([length]) + payload
    return payload


@each_kind
@pytest.mark.parametrize(
    "raw", [b"\xff\xff\xff", b"\x0a\x05ab", b"\x0a\x02\xc3\x28", nested(2000)],
    ids=["garbage", "cut-off", "not-utf8", "too-deep"],
)  # fmt: skip
async def test_malformed_requests(call: Callable[[EchoStub, Any], Any], raw: bytes) -> None:
    async with echo_service(str.upper) as (stub, _):
        error = from_rpc_error(await refused(call(stub, raw)))
        assert isinstance(error, InvalidArgument)
        assert error.reason == "MALFORMED_REQUEST"
        assert (await stub.unary(Echo(text="a"))).text == "A"


async def test_health_is_as_robust() -> None:
    server = ServiceServer()
    address = await server.start("127.0.0.1:0")
    async with open_channel(address) as channel:
        check: Any = channel.unary_unary("/grpc.health.v1.Health/Check", None, None)
        error = await refused(check(b"\xff\xff\xff"))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    await server.stop(0)


async def test_unknown_method() -> None:
    async with echo_service(str.upper) as (stub, _):
        error = await refused(stub.absent(Echo(text="x")))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
        assert from_rpc_error(error).reason == "UNKNOWN_METHOD"


async def test_size_limits() -> None:
    async with echo_service(lambda text: str(len(text))) as (stub, _):
        assert (await stub.unary(Echo(text="x" * 31_000_000), timeout=30)).text == "31000000"
        too_long = await refused(stub.unary(Echo(text="x" * (32 << 20)), timeout=30))
        assert too_long.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        metadata = (("x-big", "v" * 9000),)
        too_much = await refused(stub.unary(Echo(text="x"), metadata=metadata, timeout=5))
        assert too_much.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await stub.unary(Echo(text="x"), metadata=(("x-ok", "v" * 7000),), timeout=5)).text == "1"


async def test_gzip_bomb() -> None:
    server = ServiceServer()
    server.add(EchoServicer(lambda text: str(len(text))), SERVICE)
    address = await server.start("127.0.0.1:0")
    unlimited = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(
        address, options=unlimited, compression=grpc.Compression.Gzip
    ) as channel:
        stub = EchoStub(channel)
        assert (await stub.unary(Echo(text="x" * 1000), timeout=5)).text == "1000"
        error = await refused(stub.unary(Echo(text="x" * (64 << 20)), timeout=30))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await server.stop(0)


@pytest.mark.parametrize("kind", ["unary", "down"])
async def test_client_cancel_reaches_the_handler(kind: str) -> None:
    entered = asyncio.Event()

    async def hang(_: str) -> str:
        entered.set()
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async with echo_service(hang) as (stub, servicer):
        call = getattr(stub, kind)(Echo(text="x"))
        reader = asyncio.ensure_future(call.read() if kind == "down" else call)
        await asyncio.wait_for(entered.wait(), 20)
        call.cancel()
        await asyncio.wait_for(servicer.cleaned_up.wait(), 20)
        with pytest.raises(asyncio.CancelledError):
            await reader


async def test_client_leaving_in_the_middle_of_a_stream_closes_the_generator() -> None:
    async with echo_service(lambda _: "x" * 4_000_000) as (stub, servicer):
        call = stub.down(Echo(text="x"))
        await call.read()
        call.cancel()
        await asyncio.wait_for(servicer.cleaned_up.wait(), 20)


async def test_deadline_reaches_the_handler() -> None:
    async def hang(_: str) -> str:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async with echo_service(hang) as (stub, servicer):
        error = await refused(stub.unary(Echo(text="x"), timeout=0.2))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert from_rpc_error(error).code is grpc.StatusCode.DEADLINE_EXCEEDED
        await asyncio.wait_for(servicer.cleaned_up.wait(), 20)


@each_kind
async def test_a_cancelled_part_is_no_silence(call: Callable[[EchoStub, Any], Any]) -> None:
    """gRPC itself sends nothing when a handler raises CancelledError: the caller would wait on."""

    async def cancelled_inside(_: str) -> str:
        part = asyncio.ensure_future(asyncio.sleep(60))
        part.cancel()
        await part
        raise AssertionError("unreachable")

    async with echo_service(cancelled_inside) as (stub, _):
        error = await refused(call(stub, Echo(text="x")))
        assert error.code() is grpc.StatusCode.INTERNAL


class Doorkeeper(grpc.aio.ServerInterceptor):  # type: ignore[type-arg] # generic in the stubs only
    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        if dict(handler_call_details.invocation_metadata).get("authorization") != "Bearer open sesame":
            raise Unauthenticated("TOKEN_MISSING", "send a bearer token")
        return await continuation(handler_call_details)


@each_kind
async def test_an_inner_interceptor_may_refuse(call: Callable[[EchoStub, Any], Any]) -> None:
    async with echo_service(str.upper, interceptors=[Doorkeeper()]) as (stub, _):
        error = from_rpc_error(await refused(call(stub, Echo(text="x"))))
        assert isinstance(error, Unauthenticated)
        metadata = (("authorization", "Bearer open sesame"),)
        assert (await stub.unary(Echo(text="x"), metadata=metadata)).text == "X"


async def test_violations_survive_the_wire() -> None:
    def bad(_: str) -> str:
        raise InvalidArgument.of_field("spec.prompt.text", "must not be empty")

    async with echo_service(bad) as (stub, _):
        error = from_rpc_error(await refused(stub.unary(Echo(text="x"))))
        assert error.violations == (FieldViolation("spec.prompt.text", "must not be empty"),)
