"""One request from admission to its last event: attempts until one commits, then its tokens to the client.

Knows the order of things; how an attempt speaks to the leaders is in `attempt`, whether there is another one
in `retries`, what the client gets in `relay`.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack, asynccontextmanager
from typing import TypeAlias

import structlog

from sps2.v1 import generation_pb2
from sps2_router.admission import Admission, LiveRequest
from sps2_router.attempt import Attempt
from sps2_router.channels import LeaderChannels
from sps2_router.detokenizer import Decoder, Detokenizer
from sps2_router.handshake import Handshake
from sps2_router.relay import ChoiceRelay, Event
from sps2_router.retries import Retries, RetryLimits
from sps2_router.scheduler import Scheduler, Seat
from sps2_router.timings import Milestones, timings
from sps2_router.types import Request
from sps2_service.errors import Internal, ServiceError, Unavailable

Send: TypeAlias = Callable[[Event], Awaitable[None]]
"""Takes one event to the client; waits while the client does not read, so nothing piles up here."""

log = structlog.get_logger(__name__)


class Dispatcher:
    """Serves admitted requests."""

    def __init__(
        self,
        admission: Admission,
        scheduler: Scheduler,
        channels: LeaderChannels,
        decoder: Decoder,
        limits: RetryLimits,
    ) -> None:
        self._admission = admission
        self._scheduler = scheduler
        self._channels = channels
        self._decoder = decoder
        self._limits = limits
        self._now = asyncio.get_running_loop().time

    async def serve(self, request: Request, live: LiveRequest, arrived_at: float, send: Send) -> None:
        """Answers the request; the first `send` comes after the commit point.

        Raises:
            ServiceError: before the first `send`, when the attempts are used up; after it, what died.
        """
        retries = Retries(self._limits)
        with ExitStack() as queue:
            queue.enter_context(self._admission.queue(request.num_prompt_tokens))
            while True:
                async with AsyncExitStack() as stack:
                    try:
                        taken = await stack.enter_async_context(self._seat(request, retries))
                    except Unavailable as error:
                        raise retries.no_group(error) from None
                    attempt = await stack.enter_async_context(
                        self._attempt(request, live, taken, queue.close)
                    )
                    try:
                        await attempt.commit()
                    except ServiceError as error:
                        pause = retries.after(error, attempt.handshake.phase, taken.pair, self._now())
                        log.info(
                            "attempt failed",
                            request_id=request.request_id,
                            attempt=live.last_attempt,
                            phase=attempt.handshake.phase.name,
                            reason=error.reason,
                            pause_s=pause,
                        )
                    else:
                        return await self._answer(request, attempt, arrived_at, send)
                await asyncio.sleep(pause)

    def _seat(self, request: Request, retries: Retries) -> AbstractAsyncContextManager[Seat]:
        # A request that lost its group waits for one; a new one is told at once that there is none.
        return self._scheduler.seat(request.num_prompt_tokens, retries.avoid, patient=bool(retries.avoid))

    @asynccontextmanager
    async def _attempt(
        self, request: Request, live: LiveRequest, seat: Seat, on_prefill_started: Callable[[], None]
    ) -> AsyncIterator[Attempt]:
        pair = seat.pair
        async with (
            self._channels.use(pair.prefill_leader.grpc_address) as prefill_channel,
            self._channels.use(pair.decode_leader.grpc_address) as decode_channel,
            Attempt(
                request,
                live.next_attempt(),
                pair,
                prefill_channel=prefill_channel,
                decode_channel=decode_channel,
                scope=live.scope,
                on_prefill_started=on_prefill_started,
                on_prefill_computed=lambda: self._scheduler.leave_prefill(seat),
            ) as attempt,
        ):
            yield attempt

    async def _answer(self, request: Request, attempt: Attempt, arrived_at: float, send: Send) -> None:
        relay = ChoiceRelay(request.request_id, Detokenizer(self._decoder), request.choice.stop_token_ids)
        milestones = Milestones(arrived_at)
        first = attempt.handshake.first_token
        assert first is not None
        await send(relay.tokens(0, [first.token_id]))
        milestones.first_sent_at = milestones.last_sent_at = self._now()
        reason, q_exchange_bytes = first.finish_reason, 0
        if not reason:
            reason, q_exchange_bytes = await self._relay_tokens(attempt, relay, milestones, send)
        for event in relay.finish(reason):
            await send(event)
        usage = _usage(request, attempt.handshake, milestones, relay.num_tokens)
        summary = await attempt.summary()
        usage.bytes.CopyFrom(
            generation_pb2.BytesMoved(
                collective=summary.collective_bytes,
                q_exchange=q_exchange_bytes,
                kv_transfer=summary.kv_transfer_bytes,
            )
        )
        await send(relay.usage(usage))
        if not first.finish_reason:
            await attempt.goodbye()

    async def _relay_tokens(
        self, attempt: Attempt, relay: ChoiceRelay, milestones: Milestones, send: Send
    ) -> tuple[generation_pb2.FinishReason.ValueType, int]:
        """The token path: read, check, decode, write. Nothing else belongs here."""
        while True:
            response = await attempt.next_event()
            match response.WhichOneof("event"):
                case "tokens":
                    await send(relay.tokens(response.tokens.first_index, response.tokens.token_ids))
                    milestones.last_sent_at = self._now()
                case "finished":
                    return response.finished.reason, response.finished.q_exchange_bytes
                case event:
                    raise Internal("OUT_OF_ORDER", f"the decode leader sent {event} after the commit point")


def _usage(
    request: Request, handshake: Handshake, milestones: Milestones, num_tokens: int
) -> generation_pb2.Usage:
    return generation_pb2.Usage(
        prompt_tokens=request.num_prompt_tokens,
        output_tokens=num_tokens,
        timings=timings(milestones, handshake, num_tokens),
        attention_profile=request.attention_profile,
    )
