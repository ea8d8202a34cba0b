"""One request's tokens to the client, choice by choice, through all of its attempts to the last event.

Knows what comes when and where each choice stands; how tokens become text and events is in `relay`, how an attempt
speaks in `attempt`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

from sps2.internal.v1 import decode_service_pb2, prefill_service_pb2
from sps2.v1 import generation_pb2
from sps2_router.attempt import Attempt
from sps2_router.detokenizer import Decoder, Detokenizer
from sps2_router.handshake import Handshake
from sps2_router.metrics import RouterMetrics
from sps2_router.relay import ChoiceRelay, Event, StreamEvents
from sps2_router.timings import Milestones, timings
from sps2_router.types import Request
from sps2_service.errors import Internal

Send: TypeAlias = Callable[[Event], Awaitable[None]]
"""Takes one event to the client; waits while the client does not read, so nothing piles up here."""


class Answer:
    """The events of one request. Attempts may relay different choices at the same time."""

    def __init__(
        self, request: Request, decoder: Decoder, arrived_at: float, send: Send, metrics: RouterMetrics
    ) -> None:
        """Nothing is sent before the first attempt that has committed is relayed."""
        self._metrics = metrics
        self._request = request
        self._send = send
        self._turn = asyncio.Lock()  # of the attempts that write
        self._milestones = Milestones(arrived_at)
        self._now = asyncio.get_running_loop().time
        self._events = StreamEvents(request.request_id)
        self._choices = [
            ChoiceRelay(self._events, Detokenizer(decoder), request.choice, index)
            for index in range(request.choice.num_choices)
        ]
        self._sent_at = [0.0] * len(self._choices)
        """When each choice's newest tokens were; 0 before its first."""
        self._first: Handshake | None = None
        """That of the first attempt that committed."""
        self._bytes = generation_pb2.BytesMoved()

    @property
    def num_tokens(self) -> int:
        """Tokens sent so far, of all choices."""
        return sum(choice.num_tokens for choice in self._choices)

    async def relay(self, attempt: Attempt, request: Request) -> None:
        """Sends all that an attempt makes for the choices of `request`, the whole one or a part.

        Raises:
            ServiceError: what died; the client has what was sent before.
        """
        self._first = self._first or attempt.handshake
        await _AttemptRelay(self, attempt, self._choices_of(request)).run()

    async def rest(self, request: Request) -> list[Request]:
        """What is left of a request that an attempt was to serve: itself, each choice that goes on, or nothing."""
        choices = self._choices_of(request)
        for choice in choices:
            if not choice.finished and choice.complete:
                await self.finish(choice, choice.complete)
        if all(choice.num_tokens == len(request.generated_ids) for choice in choices):
            return [request]
        return [
            self._request.resumed(choice.index, choice.token_ids) for choice in choices if not choice.finished
        ]

    def count(self, attempt: Attempt) -> None:
        """Adds the bytes that an attempt has moved, once it is over."""
        delivered = attempt.handshake.delivered
        self._bytes.collective += delivered.collective_bytes
        self._bytes.kv_transfer += delivered.kv_transfer_bytes + delivered.fetched_bytes

    @property
    def finish_reasons(self) -> list[generation_pb2.FinishReason.ValueType]:
        """Why each choice ended."""
        return [choice.finish_reason for choice in self._choices]

    async def end(self) -> generation_pb2.Usage:
        """Sends the last event, and gives what is in it; after every choice has ended."""
        counts = [choice.num_tokens for choice in self._choices]
        assert self._first is not None, "what has ended was relayed"
        usage = generation_pb2.Usage(
            prompt_tokens=self._request.num_prompt_tokens,
            cached_tokens=self._num_cached,
            output_tokens=sum(counts),
            timings=timings(self._milestones, self._first, max(counts)),
            attention_profile=self._request.attention_profile,
            bytes=self._bytes,
        )
        await self._send(self._events.usage(usage))
        milestones = self._milestones
        self._metrics.answered(usage.timings, milestones.last_sent_at - milestones.first_sent_at)
        return usage

    async def tokens(
        self,
        choice: ChoiceRelay,
        first_index: int,
        token_ids: Sequence[int],
        logprobs: Sequence[generation_pb2.TokenLogprob],
    ) -> None:
        """Sends a choice's next tokens."""
        async with self._turn:
            await self._send(choice.tokens(first_index, token_ids, logprobs))
            self._note_sent(choice.index)

    async def finish(self, choice: ChoiceRelay, reason: generation_pb2.FinishReason.ValueType) -> None:
        """Sends a choice's end."""
        async with self._turn:
            for event in choice.finish(reason):
                await self._send(event)

    def count_q_exchange(self, num_bytes: int) -> None:
        """Adds what a choice's Q exchanges have moved in one attempt."""
        self._bytes.q_exchange += num_bytes

    def note_pace(self, finished: decode_service_pb2.DecodeFinished) -> None:
        """Takes over how fast tokens came, by the decode leader's clock."""
        self._milestones.tbt_p50, self._milestones.tbt_p99 = finished.tbt_p50_s, finished.tbt_p99_s

    def _note_sent(self, index: int) -> None:
        now, milestones = self._now(), self._milestones
        if sent_at := self._sent_at[index]:
            self._metrics.inter_token.observe(now - sent_at)
        elif not milestones.first_sent_at:
            milestones.first_sent_at = now
            self._metrics.first_token(self._request, self._num_cached, now - milestones.arrived_at)
        self._sent_at[index] = milestones.last_sent_at = now

    @property
    def _num_cached(self) -> int:
        """Prompt tokens that the first attempt has found cached."""
        first = self._first.first_token if self._first else None
        return first.cached_tokens if first else 0

    def _choices_of(self, request: Request) -> Sequence[ChoiceRelay]:
        first = request.choice.first_choice - self._request.choice.first_choice
        return self._choices[first : first + request.choice.num_choices]


class _AttemptRelay:
    """One committed attempt's events, which number the choices from 0."""

    def __init__(self, answer: Answer, attempt: Attempt, choices: Sequence[ChoiceRelay]) -> None:
        self._answer = answer
        self._attempt = attempt
        self._choices = choices
        self._q_exchange_bytes = [0] * len(choices)

    async def run(self) -> None:
        """See `Answer.relay`."""
        first = self._attempt.handshake.first_token
        assert first is not None
        ended_by_worker = False
        try:
            await self._first_tokens(first)
            while self._num_open:
                ended_by_worker = await self._next_event()
        finally:
            self._answer.count_q_exchange(sum(self._q_exchange_bytes))
        await self._attempt.summary()
        if ended_by_worker:
            await self._attempt.goodbye()

    @property
    def _num_open(self) -> int:
        return sum(not choice.finished for choice in self._choices)

    async def _first_tokens(self, first: prefill_service_pb2.FirstToken) -> None:
        for choice, token in zip(self._choices, (first, *first.more_choices), strict=True):
            logprobs = [token.logprob] if token.HasField("logprob") else []
            await self._answer.tokens(choice, choice.num_tokens, [token.token_id], logprobs)
            await self._end_if_over(choice, token.finish_reason)

    async def _next_event(self) -> bool:
        """The token path: read, check, decode, write. Nothing else belongs here.

        Returns:
            Whether the worker has ended a choice.
        """
        response = await self._attempt.next_event()
        match response.WhichOneof("event"):
            case "tokens":
                await self._tokens(response.tokens)
                return False
            case "finished":
                choice = self._choice(response.finished.choice_index)
                self._answer.note_pace(response.finished)
                self._q_exchange_bytes[response.finished.choice_index] = response.finished.q_exchange_bytes
                if not choice.finished:
                    await self._answer.finish(choice, response.finished.reason)
                return True
            case event:
                raise Internal("OUT_OF_ORDER", f"the decode leader sent {event} after the commit point")

    async def _tokens(self, tokens: decode_service_pb2.DecodedTokens) -> None:
        choice = self._choice(tokens.choice_index)
        self._q_exchange_bytes[tokens.choice_index] = tokens.q_exchange_bytes
        if choice.finished:
            return  # overrun of a choice that a stop string has ended
        await self._answer.tokens(choice, tokens.first_index, tokens.token_ids, tokens.logprobs)
        await self._end_if_over(choice)

    async def _end_if_over(
        self,
        choice: ChoiceRelay,
        reason: generation_pb2.FinishReason.ValueType = generation_pb2.FINISH_REASON_UNSPECIFIED,
    ) -> None:
        if reason or choice.stopped:
            await self._answer.finish(choice, reason or generation_pb2.FINISH_REASON_STOP)
            # The end of the call tells the worker of the last one.
            if not reason and self._num_open:
                await self._attempt.stop_choice(self._choices.index(choice))

    def _choice(self, index: int) -> ChoiceRelay:
        if not 0 <= index < len(self._choices):
            raise Internal("UNKNOWN_CHOICE", f"the decode leader sent choice {index} of {len(self._choices)}")
        return self._choices[index]
