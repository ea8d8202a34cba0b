"""Channels: targets and deadlines."""

import asyncio
import time
from typing import Any

import grpc
import pytest

from sps2_service.channel import deadline, open_channel
from sps2_service.errors import DeadlineExceeded
from sps2_service.server import ServiceServer
from sps2_service.status import from_rpc_error
from support.echo_service import SERVICE, Echo, EchoStub
from support.ports import free_port


class Recorder:
    """Answers with what `deadline` says about its own call."""

    def __init__(self, cap: float) -> None:
        self.cap = cap

    async def Unary(self, _: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:  # noqa: N802
        return Echo(text=str(deadline(context, self.cap)))

    Down = Up = Both = Unary


async def answered(cap: float, timeout: float | None) -> float:
    server = ServiceServer()
    server.add(Recorder(cap), SERVICE)
    address = await server.start("localhost:0")
    async with open_channel(address) as channel:
        text = (await EchoStub(channel).unary(Echo(), timeout=timeout)).text
    await server.stop(0)
    return float(text)


async def test_deadline_is_what_the_caller_has_left() -> None:
    assert 3 < await answered(cap=60, timeout=5) < 6  # gRPC rounds up what is left on the wire


async def test_deadline_is_capped() -> None:
    assert await answered(cap=0.5, timeout=5) == 0.5
    assert await answered(cap=0.5, timeout=None) == 0.5


class Expired:
    def time_remaining(self) -> float:
        return -0.1


class Slow:
    """Answers long after any call of these tests has ended."""

    async def Unary(self, _: Any, __: grpc.aio.ServicerContext[Any, Any]) -> Any:  # noqa: N802
        await asyncio.sleep(30)
        return Echo()

    Down = Up = Both = Unary


async def test_a_passed_deadline_fails_the_next_call_at_once() -> None:
    timeout = deadline(Expired(), 10)  # type: ignore[arg-type] # all that `deadline` asks of a context
    assert timeout == 0
    server = ServiceServer()
    server.add(Slow(), SERVICE)  # gRPC counts whole milliseconds: a quick answer might still be let through
    began = time.monotonic()
    async with open_channel(await server.start("127.0.0.1:0")) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await EchoStub(channel).unary(Echo(), timeout=timeout)
        assert isinstance(from_rpc_error(caught.value), DeadlineExceeded)
    assert time.monotonic() - began < 5
    await server.stop(0)


async def test_nobody_there_is_unavailable() -> None:
    async with open_channel(f"127.0.0.1:{free_port()}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await EchoStub(channel).unary(Echo(), timeout=5)
        error = from_rpc_error(caught.value)
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE")


async def test_a_restarted_peer_is_found_again() -> None:
    server = ServiceServer()
    server.add(Recorder(1), SERVICE)
    address = await server.start("127.0.0.1:0")
    async with open_channel(address) as channel:
        stub = EchoStub(channel)
        await stub.unary(Echo(), timeout=5)
        await server.stop(0)
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.unary(Echo(), timeout=1)
        again = ServiceServer()
        again.add(Recorder(1), SERVICE)
        await again.start(address)
        await stub.unary(Echo(), timeout=5, wait_for_ready=True)
        await again.stop(0)
