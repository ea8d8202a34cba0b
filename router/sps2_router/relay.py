"""Tokens of one choice to the events that the client gets. Pure: no gRPC, no clock.

Checks that token indices are 0, 1, 2, ... (G2), turns tokens into text, cuts it at stop strings, keeps count and
digest for Finish.
"""

import hashlib
import struct
from collections.abc import Sequence

from sps2.v1 import generation_pb2, inference_service_pb2
from sps2_router.detokenizer import Detokenizer
from sps2_router.stop_strings import StopFinder
from sps2_router.types import TokenChoice
from sps2_service.errors import Internal

Event = inference_service_pb2.StreamGenerateTextResponse


class StreamEvents:
    """Numbers the events of one stream, which its choices share."""

    def __init__(self, request_id: str) -> None:
        """`request_id` goes with the first event."""
        self._request_id = request_id
        self._num_events = 0

    def delta(self, choice_index: int, delta: generation_pb2.Delta) -> Event:
        """New tokens or text."""
        return self._numbered(Event(choice_index=choice_index, delta=delta))

    def finish(self, choice_index: int, finish: generation_pb2.Finish) -> Event:
        """The end of a choice."""
        return self._numbered(Event(choice_index=choice_index, finish=finish))

    def usage(self, usage: generation_pb2.Usage) -> Event:
        """The last event."""
        return self._numbered(Event(usage=usage))

    def _numbered(self, event: Event) -> Event:
        event.sequence_number = self._num_events
        if not self._num_events:
            event.request_id = self._request_id
        self._num_events += 1
        return event


class ChoiceRelay:
    """One choice's events, in order: `tokens` any number of times, then `finish`."""

    def __init__(
        self, events: StreamEvents, detokenizer: Detokenizer, choice: TokenChoice, index: int = 0
    ) -> None:
        """The stop tokens of `choice` are given as tokens but never as text."""
        self._events = events
        self._detokenizer = detokenizer
        self.index = index
        self._stop_token_ids = frozenset(choice.stop_token_ids)
        self._stops = StopFinder(choice.stop_strings)
        self._min_tokens = choice.min_tokens
        self._max_tokens = choice.max_tokens
        self._digest = hashlib.sha256()
        self.token_ids: list[int] = []
        """What was given so far, the stop tokens included."""
        self.finish_reason: generation_pb2.FinishReason.ValueType = generation_pb2.FINISH_REASON_UNSPECIFIED
        """Why it has ended, once it has. Tokens that come later are the overrun."""

    @property
    def finished(self) -> bool:
        """Whether `finish` was called."""
        return self.finish_reason != generation_pb2.FINISH_REASON_UNSPECIFIED

    @property
    def num_tokens(self) -> int:
        """Tokens given so far."""
        return len(self.token_ids)

    @property
    def complete(self) -> generation_pb2.FinishReason.ValueType:
        """Why a worker draws no token more, though it may not have said so; UNSPECIFIED where it does."""
        if self.token_ids and self.token_ids[-1] in self._stop_token_ids:
            return generation_pb2.FINISH_REASON_STOP
        if self.num_tokens >= self._max_tokens:
            return generation_pb2.FINISH_REASON_LENGTH
        return generation_pb2.FINISH_REASON_UNSPECIFIED

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come: the choice is to be finished, and its worker told."""
        return self._stops.found

    def tokens(
        self,
        first_index: int,
        token_ids: Sequence[int],
        logprobs: Sequence[generation_pb2.TokenLogprob] = (),
    ) -> Event:
        """The event for the next tokens, up to the one that completes a stop string.

        Raises:
            Internal: `first_index` is not the next one: a token is missing or doubled.
        """
        if first_index != self.num_tokens or not token_ids:
            raise Internal(
                "TOKEN_ORDER",
                f"got {len(token_ids)} tokens from index {first_index}, the next is {self.num_tokens}",
            )
        text, count = self._text(token_ids)
        taken = token_ids[:count]
        self.token_ids.extend(taken)
        self._digest.update(struct.pack(f"<{count}i", *taken))
        delta = generation_pb2.Delta(
            text=text, token_ids=taken, first_index=first_index, logprobs=logprobs[:count]
        )
        return self._events.delta(self.index, delta)

    def finish(self, reason: generation_pb2.FinishReason.ValueType) -> list[Event]:
        """The last text if some was held back, and the Finish."""
        if reason == generation_pb2.FINISH_REASON_UNSPECIFIED:
            raise Internal("NO_FINISH_REASON", "the worker ended the choice without saying why")
        events = []
        if rest := self._rest():
            delta = generation_pb2.Delta(text=rest, first_index=self.num_tokens)
            events.append(self._events.delta(self.index, delta))
        if self.stopped:
            reason = generation_pb2.FINISH_REASON_STOP
        self.finish_reason = reason
        finish = generation_pb2.Finish(
            reason=reason, token_count=self.num_tokens, digest=self._digest.digest()
        )
        return [*events, self._events.finish(self.index, finish)]

    def _text(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """The text that the next tokens make certain, and how many of them the choice takes."""
        if not self._stops.active:
            return self._detokenize(token_ids), len(token_ids)
        text = ""
        for count, token_id in enumerate(token_ids, start=1):
            ends = self.num_tokens + count >= self._min_tokens
            text += self._stops.push(self._detokenize([token_id]), ends=ends)
            if self.stopped:
                return text, count
        return text, len(token_ids)

    def _detokenize(self, token_ids: Sequence[int]) -> str:
        return self._detokenizer.push(one for one in token_ids if one not in self._stop_token_ids)

    def _rest(self) -> str:
        """What the end makes certain; half a character may complete a stop string, too."""
        if self.stopped:
            return ""
        return self._stops.push(self._detokenizer.flush()) + self._stops.flush()
