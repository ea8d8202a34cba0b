"""One attempt's way through a prefill and a decode group: two calls, driven to the commit point, then tokens.

Whatever happens, leaving the block ends both calls and every task, so both leaders free what they hold. It
knows one pair of groups; who they are and what happens after a failure is `dispatch`'s business.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import grpc
import structlog

from sps2.internal.v1 import (
    decode_service_pb2,
    decode_service_pb2_grpc,
    placement_pb2,
    prefill_service_pb2,
    prefill_service_pb2_grpc,
)
from sps2_router import wire
from sps2_router.handshake import Handshake, Step
from sps2_router.request_trace import AttemptTrace
from sps2_router.scope import CallScope
from sps2_router.types import GroupPair, Request
from sps2_router.worker_errors import ended_early, worker_error
from sps2_service import span_names
from sps2_service.errors import ServiceError

# What the summary of prefill (bytes moved) may lag behind the last token before usage goes without it.
SUMMARY_WAIT_S = 0.25
# What the decode leader gets to end its call by itself after its last word, before it is cancelled.
GOODBYE_S = 0.5
# What the decode leader gets to say that it has preempted the attempt when prefill cannot deliver its KV.
CAUSE_WAIT_S = 0.25

log = structlog.get_logger(__name__)


class Attempt:
    """Use as `async with`: `commit` once, then `next_event` until it says finished, then `summary`."""

    def __init__(
        self,
        request: Request,
        number: int,
        pair: GroupPair,
        *,
        prefill_channel: grpc.aio.Channel,
        decode_channel: grpc.aio.Channel,
        scope: CallScope,
        trace: AttemptTrace,
        asked_at_us: int,
        on_prefill_started: Callable[[], None],
        on_prefill_computed: Callable[[], None],
    ) -> None:
        """For `asked_at_us` see ReserveKv.

        `on_prefill_started` is called when the prompt leaves the queue (perhaps more than once).
        `on_prefill_computed` is called when the prefill group may compute something else.
        """
        self.handshake = Handshake(request.num_tokens, request.choice.num_choices)
        self.number = number
        self._asked_at_us = asked_at_us
        self._request = request
        self._pair = pair
        self._attempt = placement_pb2.Attempt(request_id=request.request_id, number=number)
        self._prefill_channel = prefill_channel
        self._scope = scope
        self._trace = trace
        self._on_prefill_started = on_prefill_started
        self._on_prefill_computed = on_prefill_computed
        self._now = asyncio.get_running_loop().time
        self._answerable = asyncio.Event()
        # Any: the stubs are typed for synchronous channels.
        stub: Any = decode_service_pb2_grpc.DecodeServiceStub(decode_channel)
        self._decode: Any = stub.Decode(timeout=scope.remaining, metadata=trace.metadata(span_names.DECODE))
        self._write_failed = False
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self._decode.cancel()
        for task in self._tasks:  # the prefill task ends its call in turn
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def commit(self) -> None:
        """Drives both leaders to the commit point, or to a first token that finishes the request.

        Raises:
            ServiceError: what failed; nothing was given to the client.
        """
        await self._write(wire.pack_reserve(self._request, self._attempt, self._pair, self._asked_at_us))
        self.handshake.on_decode(await self.next_event(), self._now())
        steps = [self._drive_prefill(), self._await_commit(), self._await_answerable()]
        self._tasks = [asyncio.create_task(step) for step in steps]
        waiting = set(self._tasks)
        while not self._answerable.is_set():
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                await self._check(task)

    async def _check(self, task: asyncio.Task[None]) -> None:
        """Raises what a step of the commit has failed with.

        A preemption is told by the decode leader, and may come after what it does to the transfer.
        """
        _, committing, _ = self._tasks
        if task.exception() is not None:
            await asyncio.wait([committing], timeout=CAUSE_WAIT_S)
        # An answerable attempt stays one, whatever else failed in the same moment.
        if not self._answerable.is_set():
            if committing.done():
                committing.result()
            task.result()

    async def next_event(self) -> decode_service_pb2.DecodeResponse:
        """The decode leader's next word.

        Raises:
            ServiceError: what died, or that the leader ended its stream too early.
        """
        try:
            response = await self._decode.read()
        except grpc.aio.AioRpcError as error:
            leader = self._pair.decode_leader
            raise worker_error(error, leader, write_failed=self._write_failed) from error
        if not isinstance(response, decode_service_pb2.DecodeResponse):  # the end of the stream
            raise ended_early(self._pair.decode_leader, "`finished`")
        self._scope.touch()
        return response

    async def stop_choice(self, choice_index: int) -> None:
        """Ends one choice of several; its tokens that are on their way may still come.

        Raises:
            ServiceError: the decode leader is gone.
        """
        await self._write(wire.pack_stop(choice_index))

    async def summary(self) -> prefill_service_pb2.PrefillDelivered:
        """What prefill summed up; all zero when its leader died before it could."""
        await asyncio.wait(self._tasks[:1], timeout=SUMMARY_WAIT_S)
        return self.handshake.delivered

    async def goodbye(self) -> None:
        """Lets the decode leader end its finished call in peace, instead of cancelling it."""
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError):
            async with asyncio.timeout(GOODBYE_S):
                await self._decode.done_writing()
                await self._decode.read()

    async def _write(self, message: decode_service_pb2.DecodeRequest) -> None:
        """A call that has ended takes nothing more; the next read says why."""
        try:
            await self._decode.write(message)
        except grpc.aio.AioRpcError as error:
            self._write_failed = True
            log.debug("the decode call has ended under a write", code=error.code().name)
        except asyncio.InvalidStateError:
            log.debug("the decode call has ended before a write")

    async def _await_answerable(self) -> None:
        await self._answerable.wait()

    async def _await_commit(self) -> None:
        if self.handshake.on_decode(await self.next_event(), self._now()) is Step.ANSWER:
            self._answerable.set()

    async def _drive_prefill(self) -> None:
        try:
            await self._read_prefill()
        except ServiceError as error:
            if not self._answerable.is_set():
                raise
            log.info("prefill failed after the commit point", reason=error.reason, code=error.code.name)

    async def _read_prefill(self) -> None:
        stub: Any = prefill_service_pb2_grpc.PrefillServiceStub(self._prefill_channel)
        assert self.handshake.placement is not None
        call: Any = stub.Prefill(
            wire.pack_prefill(
                self._request, self._attempt, self.handshake.placement, self._pair.prefill.name
            ),
            timeout=self._scope.remaining,
            metadata=self._trace.metadata(span_names.PREFILL),
        )
        leader = self._pair.prefill_leader
        try:
            while isinstance(response := await call.read(), prefill_service_pb2.PrefillResponse):
                self._scope.touch()
                await self._take_prefill(response)
        except grpc.aio.AioRpcError as error:
            raise worker_error(error, leader) from error
        finally:
            call.cancel()
        if self.handshake.first_token is None:
            raise ended_early(leader, "`first_token`")

    async def _take_prefill(self, response: prefill_service_pb2.PrefillResponse) -> None:
        step = self.handshake.on_prefill(response, self._now())
        self._on_prefill_started()
        if response.HasField("first_token"):
            self._on_prefill_computed()
        if step is Step.START:
            await self._write(wire.pack_start(response.first_token))
        elif step is Step.ANSWER:
            self._answerable.set()
