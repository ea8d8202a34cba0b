"""A service for tests, described at run time: all four kinds of methods over one recursive message."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

PACKAGE = "sps2.test"


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="sps2/test/echo.proto", package=PACKAGE, syntax="proto3")
    message = file.message_type.add(name="Echo")
    kinds = descriptor_pb2.FieldDescriptorProto
    message.field.add(name="text", number=1, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
    message.field.add(
        name="inner",
        number=2,
        type=kinds.TYPE_MESSAGE,
        label=kinds.LABEL_OPTIONAL,
        type_name=".sps2.test.Echo",
    )
    service = file.service.add(name="EchoService")
    for name, streams_in, streams_out in (
        ("Unary", False, False),
        ("Down", False, True),
        ("Up", True, False),
        ("Both", True, True),
    ):
        service.method.add(
            name=name,
            input_type=".sps2.test.Echo",
            output_type=".sps2.test.Echo",
            client_streaming=streams_in,
            server_streaming=streams_out,
        )
    return file


_POOL = descriptor_pool.DescriptorPool()
_POOL.Add(_file())
SERVICE: ServiceDescriptor = _POOL.FindServiceByName("sps2.test.EchoService")
Echo: Any = GetMessageClass(_POOL.FindMessageTypeByName("sps2.test.Echo"))


class EchoServicer:
    """Does what `on_call` says for a text; streams answer twice."""

    def __init__(self, on_call: Callable[[str], Any]) -> None:
        self.on_call = on_call
        self.cleaned_up = asyncio.Event()

    async def _answer(self, request: Any) -> Any:
        result = self.on_call(request.text)
        if asyncio.iscoroutine(result):
            result = await result
        return Echo(text=result)

    async def Unary(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:  # noqa: N802
        try:
            return await self._answer(request)
        finally:
            self.cleaned_up.set()

    async def Down(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:  # noqa: N802
        try:
            yield await self._answer(request)
            yield await self._answer(request)
        finally:
            self.cleaned_up.set()

    async def Up(self, requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:  # noqa: N802
        return Echo(text="+".join([(await self._answer(one)).text async for one in requests]))

    async def Both(self, requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:  # noqa: N802
        async for one in requests:
            yield await self._answer(one)


class EchoStub:
    """Calls that send raw bytes or messages and return messages."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        prefix = f"/{PACKAGE}.EchoService/"
        both: dict[str, Any] = {"request_serializer": _serialize, "response_deserializer": Echo.FromString}
        self.unary: Any = channel.unary_unary(prefix + "Unary", **both)
        self.down: Any = channel.unary_stream(prefix + "Down", **both)
        self.up: Any = channel.stream_unary(prefix + "Up", **both)
        self.both: Any = channel.stream_stream(prefix + "Both", **both)
        self.absent: Any = channel.unary_unary(prefix + "Absent", **both)


def _serialize(request: Any) -> bytes:
    serialized: bytes = request if isinstance(request, bytes) else request.SerializeToString()
    return serialized
