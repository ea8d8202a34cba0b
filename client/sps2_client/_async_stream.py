"""The asynchronous stream: `_stream` with asyncio's own time limits."""

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Protocol, Self

import grpc

from sps2.v1 import inference_service_pb2
from sps2_client._core import StreamCore
from sps2_client._errors import SPS2Error
from sps2_client._options import Timeouts
from sps2_client._types import Event, Generation

Response = inference_service_pb2.StreamGenerateTextResponse


class OpenAsyncStream(Protocol):
    """Starts a try of the call with seconds until its deadline."""

    def __call__(
        self, request: inference_service_pb2.StreamGenerateTextRequest, *, timeout: float
    ) -> "grpc.aio.UnaryStreamCall[inference_service_pb2.StreamGenerateTextRequest, Response]": ...


class AsyncStream(StreamCore, AsyncIterator[Event]):
    """One generation, event by event. The call starts when the stream is made; one task iterates.

    As an async context manager it cancels on the server what was not read to its end. Every fault is an
    `SPS2Error`; iteration ends normally only after a complete, checked answer.
    """

    def __init__(
        self,
        open_stream: OpenAsyncStream,
        request: inference_service_pb2.StreamGenerateTextRequest,
        *,
        address: str,
        timeouts: Timeouts,
        max_retries: int,
    ) -> None:
        super().__init__(request, address, timeouts, max_retries)
        self._open_stream = open_stream
        self._closed = False
        self._call = open_stream(request, timeout=self._deadline.left)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        """The next event.

        Raises:
            SPS2Error: the call failed; `received` holds what had come. Later calls raise it again.
        """
        if self._error is not None:
            raise self._error
        if self._generation is not None:
            raise StopAsyncIteration
        try:
            event = await self._advance()
        except SPS2Error as error:
            self._error = error
            self._call.cancel()
            raise
        if event is None:
            raise StopAsyncIteration
        return event

    async def final(self) -> Generation:
        """Reads to the end and returns the whole answer.

        Raises:
            SPS2Error: as iteration does.
        """
        async for _ in self:
            pass
        assert self._generation is not None  # iteration ends normally only then
        return self._generation

    def close(self) -> None:
        """Cancels the call unless it has ended; safe to call twice."""
        self._closed = True
        self._call.cancel()

    async def _advance(self) -> Event | None:
        while True:
            try:
                message = await self._read()
            except grpc.RpcError as error:
                await self._recover(error)
                continue
            if message is None:
                self._generation = self._assembly.complete()
                return None
            return self._assembly.take(message)

    async def _read(self) -> Response | None:
        """The next message; None at a normal end."""
        try:
            async with asyncio.timeout(self._event_limit()):
                message = await self._call.read()
        except TimeoutError as error:
            raise self._timed_out() from error
        except asyncio.CancelledError:
            # gRPC reports a call that `close` cancelled in the same way as a cancelled task.
            if self._closed:
                raise self._closed_error() from None
            raise
        return message if isinstance(message, Response) else None

    async def _recover(self, error: grpc.RpcError) -> None:
        """Opens the next try, or raises what the failure means."""
        if self._closed:
            raise self._closed_error() from error
        failure = self._failure(error)
        delay = self._retry_delay(failure)
        if delay is None:
            raise failure from error
        await asyncio.sleep(delay)
        if self._closed:
            raise self._closed_error() from error
        self._call = self._open_stream(self._request, timeout=self._deadline.left)
