"""DecodeService of a leader: unpack, check, call, pack."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import grpc

from sps2.internal.v1 import decode_service_pb2
from sps2.v1 import generation_pb2
from sps2_decode_worker.attempts import ChoiceToken, LiveAttempt
from sps2_decode_worker.coordinator import DecodeCoordinator
from sps2_decode_worker.validation import check_reserve, check_start
from sps2_service.errors import InvalidArgument
from sps2_service.request_fields import Vocabulary
from sps2_service.telemetry import bind_request


class DecodeServicer:
    """Implements `sps2.internal.v1.DecodeService`."""

    def __init__(self, coordinator: DecodeCoordinator, vocabulary: Vocabulary) -> None:
        self._coordinator = coordinator
        self._vocabulary = vocabulary

    async def Decode(  # noqa: N802 - named by the proto
        self,
        requests: AsyncIterator[decode_service_pb2.DecodeRequest],
        _context: "grpc.aio.ServicerContext[Any, Any]",
    ) -> AsyncIterator[decode_service_pb2.DecodeResponse]:
        """See decode_service.proto. The call is the attempt's lifetime: its end frees everything."""
        reserve = await _next_step(requests, "reserve")
        check_reserve(reserve.reserve, self._vocabulary)
        bind_request(reserve.reserve.attempt.request_id, reserve.reserve.attempt.number)
        live = await self._coordinator.reserve(reserve.reserve)
        try:
            yield decode_service_pb2.DecodeResponse(placement=live.reserve.placement)
            # Prefill computes meanwhile; a group that breaks under it is told at once, not at `start`.
            start = await _first_of(_next_step(requests, "start"), live)
            check_start(start.start, len(live.rows), self._vocabulary)
            await self._coordinator.commit(live, start.start)
            stops = asyncio.ensure_future(self._stop_choices(requests, live))
            try:
                yield decode_service_pb2.DecodeResponse(committed=decode_service_pb2.DecodeCommitted())
                async for token in self._coordinator.tokens(live):
                    yield _tokens(token)
                    if token.token.finish_reason != generation_pb2.FINISH_REASON_UNSPECIFIED:
                        yield _finished(token, live)
            finally:
                stops.cancel()
                await asyncio.gather(
                    stops, return_exceptions=True
                )  # the call is over: so is what it asks for
        finally:
            self._coordinator.release(live)

    async def ResizeAttempt(  # noqa: N802 - named by the proto
        self,
        request: decode_service_pb2.ResizeAttemptRequest,
        _context: "grpc.aio.ServicerContext[Any, Any]",
    ) -> decode_service_pb2.ResizeAttemptResponse:
        """See decode_service.proto."""
        return await self._coordinator.resize(request)

    async def _stop_choices(
        self, requests: AsyncIterator[decode_service_pb2.DecodeRequest], live: LiveAttempt
    ) -> None:
        """Does what the router asks for while tokens go the other way; what is no stop is ignored."""
        async for request in requests:
            if request.HasField("stop"):
                self._coordinator.stop(live, request.stop.choice_index)


async def _next_step(
    requests: AsyncIterator[decode_service_pb2.DecodeRequest], expected: str
) -> decode_service_pb2.DecodeRequest:
    async for request in requests:
        if request.WhichOneof("step") == expected:
            return request
        break
    raise InvalidArgument("WRONG_STEP", f"the next message of a Decode call must be `{expected}`")


async def _first_of(
    step: Coroutine[Any, Any, decode_service_pb2.DecodeRequest], live: LiveAttempt
) -> decode_service_pb2.DecodeRequest:
    """The router's next message, unless the row fails first.

    Raises:
        ServiceError: the row has failed.
    """
    reading = asyncio.ensure_future(step)
    failing = asyncio.ensure_future(live.failed.wait())
    try:
        await asyncio.wait([reading, failing], return_when=asyncio.FIRST_COMPLETED)
        if live.error is not None:
            raise live.error
        return await reading
    finally:
        reading.cancel()
        failing.cancel()


def _tokens(one: ChoiceToken) -> decode_service_pb2.DecodeResponse:
    token = one.token
    tokens = decode_service_pb2.DecodedTokens(
        first_index=token.index,
        token_ids=[token.token_id],
        choice_index=one.choice_index,
        logprobs=[token.logprob] if token.HasField("logprob") else [],
        q_exchange_bytes=token.q_exchange_bytes,
    )
    return decode_service_pb2.DecodeResponse(tokens=tokens)


def _finished(one: ChoiceToken, live: LiveAttempt) -> decode_service_pb2.DecodeResponse:
    finished = decode_service_pb2.DecodeFinished(
        reason=one.token.finish_reason,
        q_exchange_bytes=one.token.q_exchange_bytes,
        num_holders=len(live.row.tenant.spread.holders),
        choice_index=one.choice_index,
        tbt_p50_s=live.pace.quantile(0.5),
        tbt_p99_s=live.pace.quantile(0.99),
    )
    return decode_service_pb2.DecodeResponse(finished=finished)
