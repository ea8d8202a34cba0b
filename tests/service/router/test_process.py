"""The router as a process: flags, health while groups load, SIGTERM, refusals to start."""

import asyncio
import copy
import signal
import sys
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sps2.v1 import cluster_pb2, inference_service_pb2, inference_service_pb2_grpc
from sps2_service.channel import open_channel
from sps2_service.directory_client import DirectoryClient
from sps2_service.model_folder import ModelFolder
from support.directory import DirectoryProcess, start_directory
from support.fake_workers import FakeDecode, FakeDirectory, FakePrefill
from support.ports import free_port
from support.process import ManagedProcess
from support.redis_server import RedisServer, redis_server
from support.router_deployment import Code, failure, prompt, reason, status_of, until
from support.tiny_model import write_tiny_model

__all__ = ["redis_server", "start_directory"]

pytestmark = pytest.mark.service
Start = Callable[..., ManagedProcess]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny")


@pytest.fixture
async def leaders(model: Path) -> AsyncIterator[tuple[FakeDirectory, FakePrefill, FakeDecode]]:
    directory, prefill, decode = FakeDirectory(), FakePrefill(), FakeDecode()
    for server in (prefill, decode, directory):
        await server.start()
    able = cluster_pb2.WorkerCapabilities(model_hash=ModelFolder(model).model_hash, dtype="fp32")
    directory.workers = [prefill.info(capabilities=able), decode.info(capabilities=able)]
    yield directory, prefill, decode
    for server in (prefill, decode, directory):
        await server.stop()


@pytest.fixture
def free_address() -> str:
    return f"127.0.0.1:{free_port()}"


def router_command(model: Path, directory: str, address: str, *flags: str) -> list[str | Path]:
    command: list[str | Path] = [sys.executable, "-P", "-m", "sps2_router", "--listen", address]
    return [*command, "--directory", directory, "--model", model, *flags]


async def test_sigterm_finishes_streams_and_exits_with_0(
    processes: Start, model: Path, leaders: tuple[FakeDirectory, FakePrefill, FakeDecode], free_address: str
) -> None:
    """A router that has the model's hash in place of its weights."""
    directory, _, decode = leaders
    decode.tokens, decode.pause_s = [60] * 20, 0.05
    model_hash = ModelFolder(model).model_hash
    (model / "model.safetensors").unlink()
    router = processes(router_command(model, directory.address, free_address, "--model-hash", model_hash))
    await until(lambda: '"serving"' in router.output and "following the directory" in router.output, 20)
    async with open_channel(free_address) as channel:
        stub: Any = inference_service_pb2_grpc.InferenceServiceStub(channel)
        request = inference_service_pb2.StreamGenerateTextRequest(spec=prompt(model="tiny"))
        call = stub.StreamGenerateText(request, timeout=20)
        stream = aiter(call)
        events = [await anext(stream)]
        router.send(signal.SIGTERM)
        await until(lambda: "finishing live requests" in router.output)
        error = await failure(stub.StreamGenerateText(request, timeout=5))
        assert error.code() == Code.UNAVAILABLE
        events += [event async for event in stream]
    assert events[-1].HasField("usage")
    assert events[-2].finish.token_count == 21
    await until(lambda: not router.running, 10)
    assert router.wait() == 0
    assert "hello" not in router.output  # no prompts in logs


async def test_without_a_directory_calls_are_refused(
    processes: Start, model: Path, free_address: str
) -> None:
    router = processes(router_command(model, "127.0.0.1:1", free_address, "--model-name", "other"))
    await until(lambda: '"serving"' in router.output, 20)
    async with open_channel(free_address) as channel:
        stub: Any = inference_service_pb2_grpc.InferenceServiceStub(channel)
        request = inference_service_pb2.GenerateTextRequest(spec=prompt(model="other"))
        error = await failure(stub.GenerateText(request, timeout=5))
    assert (error.code(), reason(error)) == (Code.UNAVAILABLE, "DIRECTORY_AWAY")
    assert "directory" in status_of(error).message


@pytest.mark.parametrize("missing", ["tokenizer.json", "config.json"])
async def test_a_bad_model_folder_stops_it_with_one_line(
    processes: Start, model: Path, free_address: str, missing: str
) -> None:
    (model / missing).unlink()
    router = processes(router_command(model, "127.0.0.1:1", free_address))
    assert router.wait() == 1
    assert len(router.lines) == 1
    assert missing in router.output


async def test_a_cancel_reaches_the_router_process_that_serves(
    processes: Start,
    model: Path,
    redis_server: RedisServer,
    start_directory: Callable[..., DirectoryProcess],
) -> None:
    directory, prefill, decode = start_directory(redis_server.url), FakePrefill(), FakeDecode()
    decode.tokens, decode.pause_s = [60] * 400, 0.02
    able = cluster_pb2.WorkerCapabilities(model_hash=ModelFolder(model).model_hash, dtype="fp32")
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    async with DirectoryClient(directory.address) as client, asyncio.TaskGroup() as tasks:
        leases = []
        for leader in (prefill, decode):
            await leader.start()
            info = leader.info(capabilities=able, process_incarnation="life")
            leases.append(tasks.create_task(client.keep_registered(partial(copy.copy, info))))
        membership = client.membership()
        leases.append(tasks.create_task(membership.run()))
        await membership.wait_for(lambda workers: len(workers) == 2, 10)
        routers = [processes(router_command(model, directory.address, address)) for address in addresses]
        for router in routers:
            await until(lambda router=router: "following the directory" in router.output, 20)
        async with open_channel(addresses[0]) as serving, open_channel(addresses[1]) as other:
            stub: Any = inference_service_pb2_grpc.InferenceServiceStub(serving)
            request = inference_service_pb2.StreamGenerateTextRequest(
                spec=prompt(model="tiny", request_id="r")
            )
            call = stub.StreamGenerateText(request, timeout=20, wait_for_ready=True)
            ended = asyncio.ensure_future(failure(call))
            await until(lambda: decode.num_sent > 2 or ended.done(), 10)
            cancel: Any = inference_service_pb2_grpc.InferenceServiceStub(other).CancelGeneration
            await cancel(inference_service_pb2.CancelGenerationRequest(request_id="r"), timeout=5)
            error = await asyncio.wait_for(ended, 3)
            assert (error.code(), reason(error)) == (Code.CANCELLED, "CANCELLED")
            await until(lambda: decode.num_live == 0)
        for lease in leases:
            lease.cancel()
    for leader in (prefill, decode):
        await leader.stop()
