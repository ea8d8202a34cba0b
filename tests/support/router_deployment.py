"""A router in the test's process between scripted leaders and a client's calls."""

import asyncio
from pathlib import Path
from typing import Any, Self

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from sps2.v1 import (
    generation_pb2,
    inference_service_pb2,
    inference_service_pb2_grpc,
)
from sps2_router.app import Router
from sps2_router.config import RouterConfig
from sps2_router.tokenizer import ModelTokenizer
from sps2_router.types import ServedModel
from sps2_service.channel import open_channel
from sps2_service.tracing import Tracing
from support.fake_workers import FakeDecode, FakePrefill, FakeRequestDirectory, FakeView
from support.tiny_model import CONTEXT_LENGTH, EOS, VOCABULARY_SIZE, tiny_tokenizer

Code = grpc.StatusCode
MODEL = ServedModel("tiny", "hash", CONTEXT_LENGTH, VOCABULARY_SIZE, (EOS,))
CONFIG: dict[str, Any] = {
    "listen": "127.0.0.1:0",
    "model": Path(),
    "directory": "none:1",
    "regroup_wait_s": 0.3,
}


class Deployment:
    """A router in this process, its fake leaders, and a client's stubs."""

    def __init__(
        self,
        tokenizer: ModelTokenizer | None = None,
        requests: FakeRequestDirectory | None = None,
        leader_credentials: grpc.ServerCredentials | None = None,
        tracing: Tracing | None = None,
        **config: Any,
    ) -> None:
        self.view = FakeView()
        self.requests = requests or FakeRequestDirectory()
        self.prefills = [FakePrefill()]
        self.decodes = [FakeDecode()]
        self._leader_credentials = leader_credentials
        self.router = Router(
            RouterConfig(**CONFIG | config),
            MODEL,
            tokenizer or ModelTokenizer(tiny_tokenizer()),
            self.view,  # type: ignore[arg-type]
            self.requests,
            tracing,
        )

    @property
    def prefill(self) -> FakePrefill:
        return self.prefills[0]

    @property
    def decode(self) -> FakeDecode:
        return self.decodes[0]

    async def add(self, *leaders: FakePrefill | FakeDecode) -> None:
        """More leaders, known to the router."""
        for leader in leaders:
            await leader.start(self._leader_credentials)
            await self.view.put(leader.info())

    async def __aenter__(self) -> Self:
        self.address = await self.router.server.start("127.0.0.1:0")
        await self.router.started(self.address)
        self._follow = asyncio.create_task(self.router.follow())
        await self.router.server.set_serving(True)
        await self.add(self.prefill, self.decode)
        self.channel = open_channel(self.address)
        self.inference: Any = inference_service_pb2_grpc.InferenceServiceStub(self.channel)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close(None)
        await self.router.server.stop(0)
        self._follow.cancel()
        await asyncio.gather(self._follow, return_exceptions=True)
        await self.router.close()
        for leader in (*self.prefills, *self.decodes):
            await leader.stop()

    def stream(self, spec: generation_pb2.GenerationSpec | None = None, timeout: float = 10) -> Any:
        request = inference_service_pb2.StreamGenerateTextRequest(spec=spec or prompt())
        return self.inference.StreamGenerateText(request, timeout=timeout)

    def whole(self, spec: generation_pb2.GenerationSpec, timeout: float = 10) -> Any:
        request = inference_service_pb2.GenerateTextRequest(spec=spec)
        return self.inference.GenerateText(request, timeout=timeout)

    async def generate(self, spec: generation_pb2.GenerationSpec) -> Any:
        return await self.whole(spec)

    async def assert_all_freed(self) -> None:
        """Both leaders see the end of every call, soon."""
        for leader in (*self.prefills, *self.decodes):
            await until(lambda leader=leader: leader.num_live == 0)
        await until(lambda: self.router._admission.num_live == 0)
        assert self.router._queue.num_tokens == 0
        assert self.router._scheduler.num_requests_by_group == {}
        await until(lambda: not any("Attempt." in repr(task.get_coro()) for task in asyncio.all_tasks()))


async def until(predicate: Any, timeout: float = 3.0) -> None:
    async with asyncio.timeout(timeout):
        while not predicate():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.005)


def prompt(text: str = "hello world", **fields: Any) -> generation_pb2.GenerationSpec:
    return generation_pb2.GenerationSpec(text=text, **fields)


def status_of(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    status: status_pb2.Status | None = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None, error
    return status


def detail(error: grpc.aio.AioRpcError, kind: Any) -> Any:
    for one in status_of(error).details:
        if one.Unpack(kind):
            return kind
    raise AssertionError(f"no {type(kind).__name__} in {status_of(error)}")


def reason(error: grpc.aio.AioRpcError) -> str:
    info: error_details_pb2.ErrorInfo = detail(error, error_details_pb2.ErrorInfo())
    assert info.domain == "sps2"
    return info.reason


def fields(error: grpc.aio.AioRpcError) -> list[str]:
    return [one.field for one in detail(error, error_details_pb2.BadRequest()).field_violations]


async def failure(call: Any, seen: list[Any] | None = None) -> grpc.aio.AioRpcError:
    """The error that a call ends with; what a stream brings before goes into `seen`."""
    try:
        if not hasattr(call, "read"):
            raise AssertionError(f"answered {await call}")
        async for event in call:
            if seen is not None:
                seen.append(event)
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the stream ended well")
