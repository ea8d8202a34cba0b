"""ServiceServer: health, reflection, addresses, keepalive, stop; over real loopback connections."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from sps2_service.channel import ChannelOptions, open_channel
from sps2_service.server import LIVENESS, CannotListenError, ServerOptions, ServiceServer
from support.echo_service import SERVICE, Echo, EchoServicer, EchoStub
from support.ports import free_port
from support.process import ManagedProcess

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@contextlib.asynccontextmanager
async def started(
    on_call: Callable[[str], Any] = str.upper, **options: Any
) -> AsyncIterator[tuple[ServiceServer, str]]:
    server = ServiceServer(**options)
    server.add(EchoServicer(on_call), SERVICE)
    address = await server.start("127.0.0.1:0")
    try:
        yield server, address
    finally:
        await server.stop(0)


async def health(channel: grpc.aio.Channel, service: str = "") -> int:
    check: Any = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        health_pb2.HealthCheckRequest.SerializeToString,
        health_pb2.HealthCheckResponse.FromString,
    )
    status: int = (await check(health_pb2.HealthCheckRequest(service=service), timeout=5)).status
    return status


async def test_health_follows_set_serving() -> None:
    async with started() as (server, address), open_channel(address) as channel:
        assert await health(channel) == NOT_SERVING
        await server.set_serving(True)
        assert await health(channel) == SERVING
        assert await health(channel, SERVICE.full_name) == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health(channel, "no.such.Service")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        await server.set_serving(False)
        assert await health(channel, SERVICE.full_name) == NOT_SERVING


async def test_liveness_does_not_follow_set_serving() -> None:
    async with started() as (server, address), open_channel(address) as channel:
        assert await health(channel, LIVENESS) == SERVING
        await server.set_serving(True)
        await server.set_serving(False)
        assert await health(channel, LIVENESS) == SERVING


async def test_health_watch_sees_the_stop() -> None:
    async with started() as (server, address), open_channel(address) as channel:
        watch: Any = channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )
        call = watch(health_pb2.HealthCheckRequest(), timeout=10)
        assert (await call.read()).status == NOT_SERVING
        await server.set_serving(True)
        assert (await call.read()).status == SERVING
        stopping = asyncio.ensure_future(server.stop(0.2))
        assert (await call.read()).status == NOT_SERVING
        await stopping


@pytest.mark.parametrize("enabled", [True, False])
async def test_reflection_only_with_the_flag(enabled: bool) -> None:
    async with started(with_reflection=enabled) as (_, address), open_channel(address) as channel:
        call: Any = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            reflection_pb2.ServerReflectionRequest.SerializeToString,
            reflection_pb2.ServerReflectionResponse.FromString,
        )(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=5)
        if enabled:
            names = {one.name for one in (await call.read()).list_services_response.service}
            assert {SERVICE.full_name, "grpc.health.v1.Health"} <= names
        else:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_an_incomplete_servicer_is_refused_at_once() -> None:
    server = ServiceServer()
    with pytest.raises(TypeError, match=r"object lacks Unary, Down, Up, Both of sps2\.test\.EchoService"):
        server.add(object(), SERVICE)
    await server.stop(0)


async def test_unix_socket(tmp_path: Path) -> None:
    server = ServiceServer()
    server.add(EchoServicer(str.upper), SERVICE)
    address = await server.start(f"unix:{tmp_path}/echo.sock")
    async with open_channel(address) as channel:
        assert (await EchoStub(channel).unary(Echo(text="a"), timeout=5)).text == "A"
    await server.stop(0)


@pytest.mark.parametrize("address", ["127.0.0.1:notaport", "no-such-host.invalid:1", "192.0.2.1:1"])
async def test_an_address_that_cannot_be_bound(address: str) -> None:
    server = ServiceServer()
    with pytest.raises(CannotListenError, match="cannot listen on"):
        await server.start(address)
    await server.stop(0)


async def test_a_port_is_never_shared() -> None:
    async with started() as (_, address):
        server = ServiceServer()
        with pytest.raises(CannotListenError):
            await server.start(address)
        await server.stop(0)


async def test_a_health_port_follows_the_server_and_is_its_own() -> None:
    port = free_port()
    where = f"127.0.0.1:{port}"
    async with started(health_port=port) as (server, _), open_channel(where) as channel:
        assert (await health(channel), await health(channel, LIVENESS)) == (NOT_SERVING, SERVING)
        await server.set_serving(True)
        assert await health(channel) == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await EchoStub(channel).unary(Echo(text="a"), timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        again = ServiceServer(health_port=port)
        with pytest.raises(CannotListenError, match="--health-port"):
            await again.start("127.0.0.1:0")
        await again.stop(0)


async def test_stop_lets_calls_finish_and_then_cancels() -> None:
    entered, release = asyncio.Event(), asyncio.Event()

    async def wait(text: str) -> str:
        entered.set()
        await release.wait()
        return text

    async with started(wait) as (server, address), open_channel(address) as channel:
        call = EchoStub(channel).unary(Echo(text="done"), timeout=10)
        await asyncio.wait_for(entered.wait(), 20)
        stopping = asyncio.ensure_future(server.stop(5))
        await asyncio.sleep(0.05)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await EchoStub(channel).unary(Echo(text="new"), timeout=1)
        assert caught.value.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
        release.set()
        assert (await call).text == "done"
        await asyncio.wait_for(stopping, 4)


async def test_too_many_calls_at_once() -> None:
    release = asyncio.Event()

    async def wait(text: str) -> str:
        await release.wait()
        return text

    limits = ServerOptions(max_concurrent_rpcs=2)
    async with started(wait, options=limits) as (_, address), open_channel(address) as channel:
        calls = [asyncio.ensure_future(EchoStub(channel).unary(Echo(text="x"), timeout=5)) for _ in range(3)]
        done, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        error = done.pop().exception()
        assert isinstance(error, grpc.aio.AioRpcError)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        release.set()
        await asyncio.wait(calls)


@pytest.mark.slow
async def test_a_silent_stream_outlives_many_pings() -> None:
    """A default gRPC server would end this connection after three pings with ENHANCE_YOUR_CALM."""

    async def slow(text: str) -> str:
        await asyncio.sleep(6)
        return text

    eager = ChannelOptions(keepalive_s=1.0)
    async with started(slow) as (_, address), open_channel(address, options=eager) as channel:
        assert (await EchoStub(channel).down(Echo(text="still here"), timeout=20).read()).text == "still here"


STOPPABLE = """
import asyncio
from sps2_service.server import ServiceServer
from support.echo_service import SERVICE, EchoServicer

async def main():
    server = ServiceServer()
    answers = iter(["first"])
    server.add(EchoServicer(lambda text: next(answers, None) or asyncio.sleep(3600)), SERVICE)
    print("listening on", await server.start("127.0.0.1:0"), flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


@pytest.mark.slow
async def test_a_stopped_server_is_noticed(processes: Callable[..., ManagedProcess], repo_root: Path) -> None:
    env = {"PYTHONPATH": str(repo_root / "tests")}
    process = processes([sys.executable, "-P", "-c", STOPPABLE], name="server", env=env)
    address = process.wait_for_line("listening on (.*)").group(1)
    loop = asyncio.get_running_loop()
    async with open_channel(address) as channel:
        call = EchoStub(channel).down(Echo(text="x"), timeout=60)
        assert (await call.read()).text == "first"
        process.send(signal.SIGSTOP)
        start = loop.time()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert loop.time() - start < 6.5
