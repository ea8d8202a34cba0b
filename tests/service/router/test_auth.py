"""The router over real gRPC. Bearer tokens: who is let in, to what, and whose requests are whose."""

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import pytest

from sps2.v1 import cluster_service_pb2, cluster_service_pb2_grpc
from sps2.v1 import inference_service_pb2 as pb
from sps2_client import AsyncClient, PermissionDenied, Unauthenticated
from sps2_service.bearer import parse_tokens
from sps2_service.followed_file import LinesError
from support.router_deployment import Code, Deployment, failure, prompt, reason, until

pytestmark = pytest.mark.service


def line(tenant: str, token: str, *words: str) -> str:
    return " ".join([tenant, hashlib.sha256(token.encode()).hexdigest(), *words]) + "\n"


def metadata(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def rewrite(file: Path, text: str | None) -> None:
    if text is None:
        file.unlink()
    else:
        file.write_text(text)


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    file = tmp_path / "tokens"
    file.write_text(
        "# who may call\n\n"
        + line("acme", "a-token")
        + line("other", "o-token", "until=2100-01-01T00:00:00+00:00  # for long")
        + line("late", "l-token", "until=2020-01-01")
        + line("ops", "p-token", "operator")
    )
    return file


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        ((), "TOKEN_MISSING"),
        ((("authorization", "Basic eA=="),), "TOKEN_MISSING"),
        ((*metadata("a-token"), *metadata("a-token")), "TOKEN_MISSING"),
        (metadata("nobody"), "TOKEN_UNKNOWN"),
        (metadata(""), "TOKEN_UNKNOWN"),
        (metadata("l-token"), "TOKEN_EXPIRED"),
    ],
)
async def test_who_is_not_let_in(tokens: Path, sent: tuple[tuple[str, str], ...], why: str) -> None:
    async with Deployment(auth_tokens=tokens) as up:
        request = pb.GenerateTextRequest(spec=prompt())
        error = await failure(up.inference.GenerateText(request, metadata=sent, timeout=5))
        assert (error.code(), reason(error)) == (Code.UNAUTHENTICATED, why)
        error = await failure(
            up.channel.unary_unary("/sps2.v1.NoService/NoMethod", None, None)(b"", metadata=sent)
        )
        assert error.code() == Code.UNIMPLEMENTED


async def test_tenants_reach_their_own_requests_and_operators_all(tokens: Path) -> None:
    async with Deployment(auth_tokens=tokens) as up:
        up.decode.tokens, up.decode.pause_s = [9] * 400, 0.01
        request = pb.StreamGenerateTextRequest(spec=prompt(request_id="r", nonce=b"n"))
        for ender in ("a-token", "p-token"):
            call = up.inference.StreamGenerateText(request, metadata=metadata("a-token"), timeout=20)
            ended = asyncio.ensure_future(failure(call))
            await until(lambda: up.router._admission.find("r") is not None)
            about = pb.CancelGenerationRequest(request_id="r")
            error = await failure(
                up.inference.CancelGeneration(about, metadata=metadata("o-token"), timeout=5)
            )
            assert (error.code(), reason(error)) == (Code.PERMISSION_DENIED, "NOT_YOUR_REQUEST")
            watch = pb.WatchGenerationRequest(request_id="r")
            error = await failure(
                up.inference.WatchGeneration(watch, metadata=metadata("o-token"), timeout=5)
            )
            assert error.code() == Code.PERMISSION_DENIED
            # Not even with the nonce may another tenant take its place.
            error = await failure(
                up.inference.StreamGenerateText(request, metadata=metadata("o-token"), timeout=5)
            )
            assert error.code() == Code.ALREADY_EXISTS
            await up.inference.CancelGeneration(about, metadata=metadata(ender), timeout=5)
            assert (await ended).code() == Code.CANCELLED
            await up.assert_all_freed()


async def test_tenants_share_no_blocks(tokens: Path) -> None:
    async with Deployment(auth_tokens=tokens) as up:
        request = pb.GenerateTextRequest(spec=prompt("z" * 200))
        for token in ("a-token", "a-token", "o-token"):
            await up.inference.GenerateText(request, metadata=metadata(token), timeout=10)
        first, again, other = (list(one.block_hashes) for one in up.decode.reserved)
        assert first == again
        assert first
        assert not set(first) & set(other)


async def test_the_cluster_is_for_operators_and_health_for_all(tokens: Path) -> None:
    async with Deployment(auth_tokens=tokens) as up:
        stub: Any = cluster_service_pb2_grpc.ClusterServiceStub(up.channel)
        state = cluster_service_pb2.GetClusterStateRequest()
        error = await failure(stub.GetClusterState(state, metadata=metadata("a-token")))
        assert (error.code(), reason(error)) == (Code.PERMISSION_DENIED, "NOT_AN_OPERATOR")
        assert (await stub.GetClusterState(state, metadata=metadata("p-token"))).directory_connected
        await up.channel.unary_unary("/grpc.health.v1.Health/Check", None, None)(b"", timeout=5)


async def test_a_file_that_changes_is_read_again(tokens: Path) -> None:
    async with Deployment(auth_tokens=tokens) as up:
        held = ["a-token"]
        async with AsyncClient(up.address, token=lambda: held[0]) as client:
            assert (await client.generate("hello")).text
            rewrite(tokens, line("acme", "b-token"))
            with pytest.raises(Unauthenticated):
                await client.generate("hello")
            held[0] = "b-token"
            assert (await client.generate("hello")).text
            rewrite(tokens, "acme nonsense\n")  # what is wrong changes nothing
            assert (await client.generate("hello")).text
            rewrite(tokens, None)
            assert (await client.generate("hello")).text
            with pytest.raises(PermissionDenied):
                await client.cluster_state()


@pytest.mark.parametrize(
    "text",
    ["acme", "acme secret", "acme " + "0" * 63, f"acme {'0' * 64} root", f"acme {'0' * 64} until=soon"],
)
def test_a_wrong_line_is_named_and_not_shown(text: str) -> None:
    with pytest.raises(LinesError, match="line 2") as caught:
        parse_tokens("# first\n" + text)
    assert "secret" not in str(caught.value)
