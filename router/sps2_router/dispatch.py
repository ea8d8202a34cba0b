"""One request from admission to its last event: attempts, each from where the one before has come to.

Before the commit point nobody sees that an attempt has failed; after it the stream goes on with the tokens that it
would have had. Knows the order of things; how an attempt speaks to the leaders is in `attempt`, whether there is
another one in `retries`, what the client gets in `answer`.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import structlog

from sps2.v1 import generation_pb2
from sps2_router.admission import LiveRequest
from sps2_router.answer import Answer, Send
from sps2_router.attempt import Attempt
from sps2_router.channels import LeaderChannels
from sps2_router.detokenizer import Decoder
from sps2_router.handshake import Phase
from sps2_router.metrics import RouterMetrics
from sps2_router.policies.base import Ask
from sps2_router.prompt_queue import PromptQueue, Queued
from sps2_router.request_trace import AttemptTrace
from sps2_router.retries import Retries, RetryLimits
from sps2_router.retry_budget import RetryBudget
from sps2_router.scheduler import Scheduler, Seat
from sps2_router.types import GroupPair, Request
from sps2_service.errors import ServiceError, Unavailable
from sps2_service.telemetry import bound_request
from sps2_service.turns import now_us, turn_us

log = structlog.get_logger(__name__)


class Dispatcher:
    """Serves admitted requests."""

    def __init__(
        self,
        queue: PromptQueue,
        scheduler: Scheduler,
        channels: LeaderChannels,
        decoder: Decoder,
        limits: RetryLimits,
        metrics: RouterMetrics,
    ) -> None:
        self._metrics = metrics
        self._queue = queue
        self._scheduler = scheduler
        self._channels = channels
        self._decoder = decoder
        self._limits = limits
        self._budget = RetryBudget()
        self._now = asyncio.get_running_loop().time

    def check_room(self, least_tokens: int, tenant: str, turn: int, time_left: float) -> None:
        """Whether a prompt of so many tokens or more could queue now; raises as `PromptQueue.check`."""
        self._queue.check(self._scheduler.sized(Ask(least_tokens, tenant=tenant)), turn, time_left)

    async def serve(
        self, request: Request, live: LiveRequest, arrived_at: float, send: Send
    ) -> generation_pb2.FinishReason.ValueType:
        """Answers the request; the first `send` comes after the commit point. Returns why its first choice ended.

        Raises:
            ServiceError: what the last attempt has failed with, when they are used up.
        """
        answer = Answer(request, self._decoder, arrived_at, send, self._metrics)
        live.progress.count_tokens = lambda: answer.num_tokens
        turn = turn_us(now_us(), request.priority)
        count_tokens = live.progress.count_tokens
        with (
            self._metrics.answering(count_tokens),
            self._queue.hold(self._ask(request), turn, live.scope.remaining, count_tokens) as queued,
        ):
            self._budget.request()
            await self._attempts(request, live, answer, Retries(self._limits, self._budget), queued)
        live.trace.answered(await answer.end(), answer.finish_reasons)
        return answer.finish_reasons[0]

    async def _attempts(
        self,
        request: Request,
        live: LiveRequest,
        answer: Answer,
        retries: Retries,
        queued: Queued,
    ) -> None:
        """Serves a request, or a choice that goes on, until it has ended."""
        while (failure := await self._try(request, live, answer, retries, queued)) is not None:
            rest = await answer.rest(request)
            if not rest:
                return
            num_failures = retries.num_failures
            pause = retries.after(failure.error, failure.phase, failure.pair, self._now())
            if retries.num_failures > num_failures:  # neither a preemption nor a drain, nor want of room
                self._metrics.failed_over(failure.phase)
            log.info(
                "attempt failed",
                request_id=request.request_id,
                attempt=live.last_attempt,
                phase=failure.phase.name,
                reason=failure.error.reason,
                pause_s=pause,
            )
            await asyncio.sleep(pause)
            if len(rest) > 1:
                await self._apart(rest, live, answer, retries, queued)
                return
            (request,) = rest

    async def _apart(
        self, rest: Sequence[Request], live: LiveRequest, answer: Answer, retries: Retries, queued: Queued
    ) -> None:
        """Choices that have begun no longer share their text: each goes on by itself."""
        try:
            async with asyncio.TaskGroup() as choices:
                for one in rest:
                    choices.create_task(self._attempts(one, live, answer, retries.fork(), queued))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _try(
        self,
        request: Request,
        live: LiveRequest,
        answer: Answer,
        retries: Retries,
        queued: Queued,
    ) -> "_Failure | None":
        """One attempt; None when it has ended well.

        Raises:
            ServiceError: there is no group to try.
        """
        async with AsyncExitStack() as stack:
            trace = stack.enter_context(live.trace.attempt(retries.failed_at))
            try:
                with live.scope.waiting():
                    taken = await stack.enter_async_context(self._seat(request, live, retries))
            except Unavailable as error:
                raise retries.no_group(error) from None
            stack.enter_context(queued.placed())
            retries.asked_at_us = retries.asked_at_us or now_us()
            attempt = await stack.enter_async_context(
                self._attempt(request, live, taken, retries.asked_at_us, queued, trace)
            )
            trace.begun(attempt.number, taken.pair, attempt.handshake)
            live.progress.begun(attempt.handshake, attempt.number)
            try:
                await attempt.commit()
                await answer.relay(attempt, request)
            except ServiceError as error:
                trace.failed(error)
                return _Failure(error, attempt.handshake.phase, taken.pair)
            finally:
                answer.count(attempt)
                retries.had_room |= attempt.handshake.phase is not Phase.RESERVING
        return None

    def _ask(self, request: Request) -> Ask:
        choice = request.choice
        left = choice.max_tokens - len(request.generated_ids)
        ask = Ask(request.num_tokens, left * choice.num_choices, request.tenant, request.cached)
        return self._scheduler.sized(ask)

    def _seat(
        self, request: Request, live: LiveRequest, retries: Retries
    ) -> AbstractAsyncContextManager[Seat]:
        # A request that lost its group waits for one; a new one is told at once that there is none.
        is_new = retries.asked_at_us is None
        return self._scheduler.seat(
            self._ask(request),
            retries.avoid,
            turn=turn_us(retries.asked_at_us or now_us(), request.priority),
            had_seat=not is_new,
            wait_s=self._limits.queue_wait_s if is_new else None,
            patient=bool(retries.avoid),
            on_queued=live.progress.queued,
        )

    @asynccontextmanager
    async def _attempt(
        self,
        request: Request,
        live: LiveRequest,
        seat: Seat,
        asked_at_us: int,
        queued: Queued,
        trace: AttemptTrace,
    ) -> AsyncIterator[Attempt]:
        pair, number = seat.pair, live.next_attempt()
        with bound_request(request.request_id, number):
            log.info("attempt begins", prefill=pair.prefill.name, decode=pair.decode.name)
            async with (
                self._channels.use(pair.prefill_leader.grpc_address) as prefill_channel,
                self._channels.use(pair.decode_leader.grpc_address) as decode_channel,
                Attempt(
                    request,
                    number,
                    pair,
                    prefill_channel=prefill_channel,
                    decode_channel=decode_channel,
                    scope=live.scope,
                    trace=trace,
                    asked_at_us=asked_at_us,
                    on_prefill_started=queued.leave,
                    on_prefill_computed=lambda: self._scheduler.leave_prefill(seat),
                ) as attempt,
            ):
                yield attempt


@dataclass(frozen=True)
class _Failure:
    """How an attempt ended that did not end well."""

    error: ServiceError
    phase: Phase
    pair: GroupPair
