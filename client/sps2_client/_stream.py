"""The blocking stream."""

import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Protocol, Self

import grpc

from sps2.v1 import inference_service_pb2
from sps2_client._alarms import Alarm
from sps2_client._core import StreamCore
from sps2_client._errors import SPS2Error
from sps2_client._options import Timeouts
from sps2_client._types import Event, Generation


class Call(Protocol):
    """What gRPC's blocking call object really is; its stubs leave iteration out."""

    def __next__(self) -> inference_service_pb2.StreamGenerateTextResponse: ...

    def cancel(self) -> object: ...


class OpenStream(Protocol):
    """Starts a try of the call with seconds until its deadline."""

    def __call__(
        self, request: inference_service_pb2.StreamGenerateTextRequest, *, timeout: float
    ) -> Call: ...


class Stream(StreamCore, Iterator[Event]):
    """One generation, event by event. The call starts when the stream is made; one thread iterates.

    As a context manager it cancels on the server what was not read to its end. Every fault is an `SPS2Error`;
    iteration ends normally only after a complete, checked answer.
    """

    def __init__(
        self,
        open_stream: OpenStream,
        request: inference_service_pb2.StreamGenerateTextRequest,
        *,
        address: str,
        timeouts: Timeouts,
        max_retries: int,
        alarm: Alarm,
    ) -> None:
        super().__init__(request, address, timeouts, max_retries)
        self._open_stream = open_stream
        self._alarm = alarm
        self._closed = threading.Event()
        self._call = open_stream(request, timeout=self._deadline.left)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        """The next event.

        Raises:
            SPS2Error: the call failed; `received` holds what had come. Later calls raise it again.
        """
        if self._error is not None:
            raise self._error
        if self._generation is not None:
            raise StopIteration
        try:
            return self._advance()
        except SPS2Error as error:
            self._error = error
            self._call.cancel()
            raise

    def final(self) -> Generation:
        """Reads to the end and returns the whole answer.

        Raises:
            SPS2Error: as iteration does.
        """
        for _ in self:
            pass
        assert self._generation is not None  # iteration ends normally only then
        return self._generation

    def close(self) -> None:
        """Cancels the call unless it has ended; safe to call twice and from another thread."""
        self._closed.set()
        self._call.cancel()

    def _advance(self) -> Event:
        while True:
            try:
                with self._alarm.armed(self._event_limit(), self._call.cancel):
                    message = next(self._call)
            except StopIteration:
                self._generation = self._assembly.complete()
                raise
            except grpc.RpcError as error:
                self._recover(error)
            else:
                return self._assembly.take(message)

    def _recover(self, error: grpc.RpcError) -> None:
        """Opens the next try, or raises what the failure means."""
        if self._closed.is_set():
            raise self._closed_error() from error
        if self._alarm.fired:
            raise self._timed_out() from error
        failure = self._failure(error)
        delay = self._retry_delay(failure)
        if delay is None:
            raise failure from error
        if self._closed.wait(delay):
            raise self._closed_error() from error
        self._call = self._open_stream(self._request, timeout=self._deadline.left)
        if self._closed.is_set():  # by another thread meanwhile, which cancelled the call before
            self._call.cancel()
