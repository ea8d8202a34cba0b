"""TLS and mTLS: router, leaders, directory and clients with certificates that the test makes."""

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sps2.v1 import inference_service_pb2, inference_service_pb2_grpc
from sps2_client import TLS, AsyncClient, Client, ConnectionFailed
from sps2_service.channel import open_channel
from sps2_service.directory_client import DirectoryClient
from sps2_service.errors import PermissionDenied, Unavailable
from sps2_service.server import LIVENESS
from sps2_service.tls import Tls
from support.certificates import Authority, Certificate
from support.directory import DirectoryProcess, start_directory
from support.ports import free_port
from support.redis_server import RedisServer, redis_server
from support.router_deployment import Deployment, failure, prompt

__all__ = ["redis_server", "start_directory"]

pytestmark = pytest.mark.service


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


def tls_of(made: Certificate, authority: Authority, **options: Any) -> Tls:
    return Tls(made.cert, made.key, authority.cert, **options)


async def test_a_router_and_its_clients(authority: Authority) -> None:
    made, own = authority.issue("router"), authority.issue("client")
    files: dict[str, Any] = {"tls_cert": made.cert, "tls_key": made.key, "tls_ca": authority.cert}
    async with Deployment(**files) as up:
        tls = TLS(authority.cert, own.cert, own.key)
        with Client(up.address, tls=tls) as client:
            assert (await asyncio.to_thread(client.list_models))[0].name == "tiny"
        async with AsyncClient(up.address, tls=TLS(authority.cert, own.cert, own.key, "router")) as named:
            assert await named.list_models()
        stranger = Authority(authority.cert.parent / "stranger")
        for wrong in (
            None,
            TLS(authority.cert),
            TLS(stranger.cert, own.cert, own.key),
            TLS(authority.cert, own.cert, own.key, "elsewhere"),
        ):
            async with AsyncClient(up.address, tls=wrong, max_retries=0) as refused:
                with pytest.raises(ConnectionFailed):
                    await refused.list_models(timeout=5)


async def test_a_router_that_asks_clients_for_no_certificate(authority: Authority) -> None:
    made = authority.issue("router")
    files: dict[str, Any] = {"tls_cert": made.cert, "tls_key": made.key, "tls_ca": authority.cert}
    async with (
        Deployment(tls_client_certs=False, **files) as up,
        AsyncClient(up.address, tls=TLS(authority.cert)) as client,
    ):
        assert await client.list_models()


async def test_a_directory_lets_in_whom_it_is_told_to(
    authority: Authority,
    redis_server: RedisServer,
    start_directory: Callable[..., DirectoryProcess],
) -> None:
    made = authority.issue("directory")
    health_port = free_port()
    flags = [*made.flags(authority.cert), "--tls-peers", "router,decode", "--health-port", str(health_port)]
    directory = start_directory(redis_server.url, *flags)
    await check_health_alone(f"127.0.0.1:{health_port}")
    async with DirectoryClient(directory.address, tls=tls_of(authority.issue("router"), authority)) as client:
        assert not (await client.get_cluster_state()).workers
    async with DirectoryClient(directory.address, tls=tls_of(authority.issue("client"), authority)) as client:
        with pytest.raises(PermissionDenied, match="tls-peers"):
            await client.get_cluster_state()
    async with DirectoryClient(directory.address) as client:
        with pytest.raises(Unavailable):
            await client.get_cluster_state()


async def check_health_alone(address: str) -> None:
    """In plaintext, as a kubelet asks; every other method is unknown there."""
    async with open_channel(address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        for service in ("", LIVENESS):
            asked = health_pb2.HealthCheckRequest(service=service)
            assert (await health.Check(asked, timeout=5)).status == health_pb2.HealthCheckResponse.SERVING
        state = "/sps2.internal.v1.KvDirectoryService/GetClusterState"
        error = await failure(channel.unary_unary(state, None, None)(b"", timeout=5))
        assert error.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_the_router_calls_leaders_with_its_certificate(authority: Authority) -> None:
    router, leader = authority.issue("router"), authority.issue("worker")
    files: dict[str, Any] = {"tls_cert": router.cert, "tls_key": router.key, "tls_ca": authority.cert}
    credentials = tls_of(leader, authority).server_credentials()
    async with Deployment(leader_credentials=credentials, **files) as up:
        tls = tls_of(authority.issue("client"), authority)
        async with open_channel(up.address, tls=tls) as channel:
            stub: Any = inference_service_pb2_grpc.InferenceServiceStub(channel)
            request = inference_service_pb2.GenerateTextRequest(spec=prompt())
            assert (await stub.GenerateText(request, timeout=10)).text
        # A client's bare connection to a leader comes to nothing.
        async with open_channel(up.decode.address) as bare:
            error = await failure(
                bare.unary_unary("/sps2.internal.v1.DecodeService/ResizeAttempt", None, None)(b"", timeout=5)
            )
            assert error.code() == grpc.StatusCode.UNAVAILABLE
