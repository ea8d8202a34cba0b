"""One request from admission to its last event: attempts until one commits, then its tokens to the client.

Knows the order of things; how an attempt speaks to the leaders is in `attempt`, whether there is another one
in `retries`, what the client gets in `answer`.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack, asynccontextmanager

import structlog

from sps2_router.admission import Admission, LiveRequest
from sps2_router.answer import Answer, Send
from sps2_router.attempt import Attempt
from sps2_router.channels import LeaderChannels
from sps2_router.detokenizer import Decoder
from sps2_router.retries import Retries, RetryLimits
from sps2_router.scheduler import Scheduler, Seat
from sps2_router.types import Request
from sps2_service.errors import ServiceError, Unavailable

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
                        return await Answer(request, attempt, self._decoder, arrived_at, send).relay()
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
