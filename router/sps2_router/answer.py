"""One committed attempt's tokens to the client, choice by choice, to the last event of its stream.

Knows what comes when; how tokens become text and events is in `relay`, how an attempt speaks in `attempt`.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from sps2.internal.v1 import decode_service_pb2, prefill_service_pb2
from sps2.v1 import generation_pb2
from sps2_router.attempt import Attempt
from sps2_router.detokenizer import Decoder, Detokenizer
from sps2_router.relay import ChoiceRelay, Event, StreamEvents
from sps2_router.timings import Milestones, timings
from sps2_router.types import Request
from sps2_service.errors import Internal

Send: TypeAlias = Callable[[Event], Awaitable[None]]
"""Takes one event to the client; waits while the client does not read, so nothing piles up here."""


class Answer:
    """The events of one request."""

    def __init__(
        self, request: Request, attempt: Attempt, decoder: Decoder, arrived_at: float, send: Send
    ) -> None:
        """`attempt` has committed; nothing was sent yet."""
        self._request = request
        self._attempt = attempt
        self._send = send
        self._milestones = Milestones(arrived_at)
        self._now = asyncio.get_running_loop().time
        self._events = StreamEvents(request.request_id)
        self._choices = [
            ChoiceRelay(self._events, Detokenizer(decoder), request.choice, index)
            for index in range(request.choice.num_choices)
        ]
        self._q_exchange_bytes = [0] * len(self._choices)

    async def relay(self) -> None:
        """Sends everything.

        Raises:
            ServiceError: what died; the client has what was sent before.
        """
        first = self._attempt.handshake.first_token
        assert first is not None
        await self._first_tokens(first)
        ended_by_worker = False
        while self._num_open:
            ended_by_worker = await self._next_event()
        usage = self._usage()
        summary = await self._attempt.summary()
        usage.bytes.CopyFrom(
            generation_pb2.BytesMoved(
                collective=summary.collective_bytes,
                q_exchange=sum(self._q_exchange_bytes),
                kv_transfer=summary.kv_transfer_bytes,
            )
        )
        await self._send(self._events.usage(usage))
        if ended_by_worker:
            await self._attempt.goodbye()

    @property
    def _num_open(self) -> int:
        return sum(not choice.finished for choice in self._choices)

    async def _first_tokens(self, first: prefill_service_pb2.FirstToken) -> None:
        for choice, token in zip(self._choices, (first, *first.more_choices), strict=True):
            logprobs = [token.logprob] if token.HasField("logprob") else []
            await self._send(choice.tokens(0, [token.token_id], logprobs))
            self._milestones.last_sent_at = self._now()
            self._milestones.first_sent_at = self._milestones.first_sent_at or self._milestones.last_sent_at
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
                self._q_exchange_bytes[choice.index] = response.finished.q_exchange_bytes
                if not choice.finished:
                    await self._finish(choice, response.finished.reason)
                return True
            case event:
                raise Internal("OUT_OF_ORDER", f"the decode leader sent {event} after the commit point")

    async def _tokens(self, tokens: decode_service_pb2.DecodedTokens) -> None:
        choice = self._choice(tokens.choice_index)
        self._q_exchange_bytes[choice.index] = tokens.q_exchange_bytes
        if choice.finished:
            return  # overrun of a choice that a stop string has ended
        await self._send(choice.tokens(tokens.first_index, tokens.token_ids, tokens.logprobs))
        self._milestones.last_sent_at = self._now()
        await self._end_if_over(choice)

    async def _end_if_over(
        self,
        choice: ChoiceRelay,
        reason: generation_pb2.FinishReason.ValueType = generation_pb2.FINISH_REASON_UNSPECIFIED,
    ) -> None:
        if reason or choice.stopped:
            await self._finish(choice, reason or generation_pb2.FINISH_REASON_STOP)
            # The end of the call tells the worker of the last one.
            if not reason and self._num_open:
                await self._attempt.stop_choice(choice.index)

    async def _finish(self, choice: ChoiceRelay, reason: generation_pb2.FinishReason.ValueType) -> None:
        for event in choice.finish(reason):
            await self._send(event)

    def _choice(self, index: int) -> ChoiceRelay:
        if not 0 <= index < len(self._choices):
            raise Internal("UNKNOWN_CHOICE", f"the decode leader sent choice {index} of {len(self._choices)}")
        return self._choices[index]

    def _usage(self) -> generation_pb2.Usage:
        counts = [choice.num_tokens for choice in self._choices]
        return generation_pb2.Usage(
            prompt_tokens=self._request.num_prompt_tokens,
            output_tokens=sum(counts),
            timings=timings(self._milestones, self._attempt.handshake, max(counts)),
            attention_profile=self._request.attention_profile,
        )
