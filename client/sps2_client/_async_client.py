"""The asynchronous client: `_client` on asyncio."""

import asyncio
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
from google.protobuf.message import Message

from sps2.v1 import (
    cluster_service_pb2,
    cluster_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    tokenizer_service_pb2,
    tokenizer_service_pb2_grpc,
)
from sps2_client import _convert
from sps2_client._async_stream import AsyncStream
from sps2_client._credentials import TLS, Token, metadata
from sps2_client._errors import ConnectionFailed
from sps2_client._options import (
    DEFAULT_UNARY_TIMEOUT_S,
    DEFAULT_WATCH_TIMEOUT_S,
    RESIZE_TIMEOUT_S,
    Deadline,
    Timeouts,
    channel_options,
    retry_delay,
)
from sps2_client._requests import ChatMessage, GenerationOptions, stream_request, tokenize_request
from sps2_client._statuses import CallContext, from_rpc_error
from sps2_client._types import ClusterChange, ClusterState, Generation, Model, Progress, Resized

Response = TypeVar("Response")


class AsyncClient:
    """A router's client for asyncio; `Client` is its twin.

    A channel is made with the first call on each event loop, since gRPC's channels belong to one loop. Every
    call has a time limit and raises nothing but `SPS2Error`, or ValueError and TypeError for arguments that
    make no request.
    """

    def __init__(
        self, address: str, *, max_retries: int = 2, tls: TLS | None = None, token: Token = None
    ) -> None:
        """Makes a client; no connection yet.

        Args:
            address: "HOST:PORT" of a router, or a gRPC target such as "dns:///routers:50051".
            max_retries: Tries after the first for a connection lost before anything came.
            tls: None for plaintext.
            token: Bearer token, or what gives one for each call; see `TLS` before one is sent in plaintext.
        """
        self._address = address
        self._tls = tls
        self._token = token
        self._max_retries = max_retries
        # A loop that is gone takes its channel with it.
        self._channels: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, grpc.aio.Channel] = (
            weakref.WeakKeyDictionary()
        )
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends all calls of this event loop and its connection; safe to call twice."""
        self._closed = True
        channel = self._channels.pop(asyncio.get_running_loop(), None)
        if channel is not None:
            await channel.close(None)

    def stream(
        self,
        prompt: str | None = None,
        *,
        timeout: Timeouts | float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> AsyncStream:
        """Starts a generation and returns its events as they come.

        Not a coroutine, but to be called on a running event loop.

        Args:
            prompt: The prompt as text; give this, `token_ids` or `messages`.
            timeout: `Timeouts`, or seconds for the whole call; None is `Timeouts()`.
            options: see `GenerationOptions`.

        Raises:
            ValueError: not exactly one form of the prompt, a number that does not fit, a limit <= 0.
            TypeError: an unknown option or a value of a wrong type.
        """
        stub = inference_service_pb2_grpc.InferenceServiceStub(self._get_channel())
        return AsyncStream(
            lambda request, *, timeout: stub.StreamGenerateText(
                request, timeout=timeout, metadata=self._metadata()
            ),
            stream_request(prompt, **options),
            address=self._address,
            timeouts=Timeouts.of(timeout),
            max_retries=self._max_retries,
        )

    async def generate(
        self,
        prompt: str | None = None,
        *,
        timeout: Timeouts | float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Generation:
        """The whole answer at once; arguments and errors as in `stream`.

        It reads a stream, so that the limits between tokens hold here too and an error carries what had come.
        """
        async with self.stream(prompt, timeout=timeout, **options) as stream:
            return await stream.final()

    async def list_models(self, *, timeout: float = DEFAULT_UNARY_TIMEOUT_S) -> tuple[Model, ...]:
        """Every model of the deployment; `timeout` in seconds."""
        stub = model_service_pb2_grpc.ModelServiceStub(self._get_channel())
        request = model_service_pb2.ListModelsRequest()
        answer = await self._ask(stub.ListModels, request, timeout)
        return tuple(_convert.model(one) for one in answer.models)

    async def tokenize(
        self,
        text: str | None = None,
        *,
        messages: Sequence[ChatMessage] | None = None,
        model: str = "",
        timeout: float = DEFAULT_UNARY_TIMEOUT_S,
    ) -> tuple[int, ...]:
        """Token ids of a text or a conversation, as a prompt gets them; `timeout` in seconds."""
        stub = tokenizer_service_pb2_grpc.TokenizerServiceStub(self._get_channel())
        request = tokenize_request(text, messages, model)
        answer = await self._ask(stub.TokenizeText, request, timeout)
        return tuple(answer.token_ids)

    async def detokenize(
        self, token_ids: Sequence[int], *, model: str = "", timeout: float = DEFAULT_UNARY_TIMEOUT_S
    ) -> str:
        """Text of token ids, special tokens left out; `timeout` in seconds."""
        stub = tokenizer_service_pb2_grpc.TokenizerServiceStub(self._get_channel())
        request = tokenizer_service_pb2.DetokenizeTokensRequest(model=model, token_ids=token_ids)
        return (await self._ask(stub.DetokenizeTokens, request, timeout)).text

    async def watch(
        self, request_id: str, *, timeout: float = DEFAULT_WATCH_TIMEOUT_S
    ) -> AsyncGenerator[Progress]:
        """How far a live request has come, also before its first token: now, on each change, and that it has ended.

        Closing the iterator, or leaving it to the garbage collector, ends the watch.

        Args:
            request_id: the request, on whichever router it is.
            timeout: seconds for the whole watch.

        Raises:
            NotFound: no such request lives.
        """
        stub = inference_service_pb2_grpc.InferenceServiceStub(self._get_channel())
        call = stub.WatchGeneration(
            inference_service_pb2.WatchGenerationRequest(request_id=request_id),
            timeout=timeout,
            metadata=self._metadata(),
        )
        async for message in self._watch(call, timeout):
            yield _convert.progress(message)

    async def watch_cluster(
        self, *, timeout: float = DEFAULT_WATCH_TIMEOUT_S
    ) -> AsyncGenerator[ClusterChange]:
        """The state of the cluster, then each change of it; closed like `watch`. `timeout` in seconds."""
        stub = cluster_service_pb2_grpc.ClusterServiceStub(self._get_channel())
        call = stub.WatchClusterState(
            cluster_service_pb2.WatchClusterStateRequest(), timeout=timeout, metadata=self._metadata()
        )
        async for message in self._watch(call, timeout):
            yield _convert.cluster_change(message)

    async def cancel(self, request_id: str, *, timeout: float = DEFAULT_UNARY_TIMEOUT_S) -> None:
        """Ends a live request and frees what it holds; `timeout` in seconds.

        Raises:
            NotFound: no router serves it, or came to serve it within a second.
        """
        stub = inference_service_pb2_grpc.InferenceServiceStub(self._get_channel())
        request = inference_service_pb2.CancelGenerationRequest(request_id=request_id)
        # No retry: the second try of a cancel that worked would be NOT_FOUND.
        await self._ask(stub.CancelGeneration, request, timeout, max_retries=0)

    async def cluster_state(self, *, timeout: float = DEFAULT_UNARY_TIMEOUT_S) -> ClusterState:
        """Every worker as the router last heard of it; `timeout` in seconds."""
        stub = cluster_service_pb2_grpc.ClusterServiceStub(self._get_channel())
        request = cluster_service_pb2.GetClusterStateRequest()
        answer = await self._ask(stub.GetClusterState, request, timeout)
        return _convert.cluster_state(answer)

    async def resize(
        self,
        request_id: str,
        degree: int,
        *,
        ranks: Sequence[int] = (),
        timeout: float = RESIZE_TIMEOUT_S,
    ) -> Resized:
        """Spreads the KV of a live request over so many ranks of its decode group; its stream goes on meanwhile.

        Args:
            request_id: the request.
            degree: ranks that are to hold its KV.
            ranks: which ones; empty: those that need least be moved.
            timeout: seconds.

        Raises:
            NotFound: no such request decodes.
            Unavailable: there is no room for it now.
            Aborted: it ended meanwhile, or another resize is under way.
        """
        stub = cluster_service_pb2_grpc.ClusterServiceStub(self._get_channel())
        request = cluster_service_pb2.ResizeRequestRequest(request_id=request_id, degree=degree, ranks=ranks)
        # No retry: the second try of a resize that worked would find other gaps, and a busy request.
        answer = await self._ask(stub.ResizeRequest, request, timeout, max_retries=0)
        return _convert.resized(answer)

    async def drain_group(self, group: str, *, timeout: float = DEFAULT_UNARY_TIMEOUT_S) -> float:
        """Lets a group leave: it takes no more requests, and what does not finish in time goes on on other groups.

        Args:
            group: for example "decode-1".
            timeout: seconds until it has begun; its end is seen in `cluster_state`.

        Returns:
            Seconds that its requests have to finish.

        Raises:
            NotFound: there is no such group.
            Unavailable: its leader does not answer.
        """
        stub = cluster_service_pb2_grpc.ClusterServiceStub(self._get_channel())
        request = cluster_service_pb2.DrainGroupRequest(group=group)
        answer = await self._ask(stub.DrainGroup, request, timeout)
        return answer.budget_s

    def _get_channel(self) -> grpc.aio.Channel:
        if self._closed:
            raise ValueError("the client is closed")
        loop = asyncio.get_running_loop()
        channel = self._channels.get(loop)
        if channel is None:
            channel = self._channels[loop] = self._open_channel()
        return channel

    def _open_channel(self) -> grpc.aio.Channel:
        if self._tls is None:
            return grpc.aio.insecure_channel(self._address, channel_options())
        options = [*channel_options(), *self._tls.options()]
        return grpc.aio.secure_channel(self._address, self._tls.credentials(), options)

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return metadata(self._token)

    async def _watch(
        self, call: "grpc.aio.UnaryStreamCall[Any, Response]", timeout: float
    ) -> AsyncGenerator[Response]:
        """The messages of a stream that nobody retries: its reader begins a new one from the state as it then is."""
        deadline = Deadline(timeout)
        started = False
        try:
            async for message in call:
                started = True
                yield message
        except grpc.RpcError as error:
            context = CallContext(started=started, time_left=deadline.left, address=self._address)
            raise from_rpc_error(error, context) from error
        finally:
            call.cancel()

    async def _ask(
        self,
        method: Callable[..., Awaitable[Response]],
        request: Message,
        timeout: float,
        max_retries: int | None = None,
    ) -> Response:
        """One unary call of a stub's method with its retries."""
        deadline = Deadline(timeout)
        retries = self._max_retries if max_retries is None else max_retries
        for attempt in range(retries + 1):
            try:
                return await method(request, timeout=deadline.left, metadata=self._metadata())
            except grpc.RpcError as error:
                context = CallContext(started=False, time_left=deadline.left, address=self._address)
                failure = from_rpc_error(error, context)
                delay = retry_delay(attempt)
                final = attempt == retries or deadline.left <= delay
                if final or not isinstance(failure, ConnectionFailed):
                    raise failure from error
            await asyncio.sleep(delay)
        raise AssertionError("the last try returns or raises")
