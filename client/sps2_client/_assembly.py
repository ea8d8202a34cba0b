"""Gathers one stream and holds it to its contract (G1, G2). Pure: no channel, no clock.

Checked: events numbered without gaps; in each choice token indices 0..n-1 once each and exactly one Finish whose
count and digest match the tokens; Usage last. What fails a check never reaches the caller as an answer.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import replace

from sps2.v1 import generation_pb2, inference_service_pb2
from sps2_client import _convert
from sps2_client._errors import ProtocolError, Received
from sps2_client._types import (
    Choice,
    Event,
    Finished,
    FinishReason,
    Generation,
    TextDelta,
    TokenLogprob,
    Usage,
    UsageReport,
)


def token_digest(token_ids: Sequence[int]) -> bytes:
    """SHA-256 over the ids as little-endian int32."""
    return hashlib.sha256(struct.pack(f"<{len(token_ids)}i", *token_ids)).digest()


class BrokenError(Exception):
    """A choice broke the contract; `Assembly` says of which stream."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ChoiceAssembly:
    """One choice so far."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.finish_reason: FinishReason | None = None
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        """Text so far."""
        return "".join(self._texts)

    def take_delta(self, delta: generation_pb2.Delta) -> TextDelta:
        """New tokens or text.

        Raises:
            BrokenError: they are not the next ones.
        """
        self._refuse_after_finish("delta")
        count = len(self.token_ids)
        # Text may come without tokens (the last characters that were held back); then the index says nothing.
        if delta.token_ids and delta.first_index != count:
            raise BrokenError("TOKEN_INDEX", f"token index {delta.first_index} instead of {count}")
        logprobs = tuple(_convert.logprob(one) for one in delta.logprobs)
        self._texts.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(logprobs)
        return TextDelta(delta.text, tuple(delta.token_ids), count, self.index, logprobs)

    def take_finish(self, finish: generation_pb2.Finish) -> Finished:
        """The end.

        Raises:
            BrokenError: it does not fit what came.
        """
        self._refuse_after_finish("Finish")
        count = len(self.token_ids)
        if finish.token_count != count:
            raise BrokenError("TOKEN_COUNT", f"Finish counts {finish.token_count} tokens, {count} came")
        if finish.digest != token_digest(self.token_ids):
            raise BrokenError("DIGEST", "the digest of Finish is not that of the tokens that came")
        reason = _convert.FINISH_REASONS.get(finish.reason)
        if reason is None:
            raise BrokenError("UNKNOWN_EVENT", f"finish reason {finish.reason}")
        self.finish_reason = reason
        return Finished(reason, count, self.index)

    def complete(self) -> Choice:
        """The whole choice.

        Raises:
            BrokenError: it never ended.
        """
        if self.finish_reason is None:
            raise BrokenError("MISSING_FINISH", "the stream ended without Finish: the answer is truncated")
        return Choice(self.text, tuple(self.token_ids), self.finish_reason, tuple(self.logprobs))

    def _refuse_after_finish(self, name: str) -> None:
        if self.finish_reason is not None:
            raise BrokenError("EVENT_AFTER_FINISH", f"a {name} after the Finish")


class Assembly:
    """One stream so far; of several choices, what is said without naming one is of the first."""

    def __init__(self, request_id: str, num_choices: int = 1) -> None:
        self.request_id = request_id
        self.usage: Usage | None = None
        self._choices = [ChoiceAssembly(0)]
        self._num_choices = max(1, num_choices)
        self._events = 0

    @property
    def started(self) -> bool:
        """Whether any event has come."""
        return self._events > 0

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the first choice ended; None while it has not."""
        return self._choices[0].finish_reason

    @property
    def text(self) -> str:
        """Text so far."""
        return self._choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Tokens so far."""
        return tuple(self._choices[0].token_ids)

    @property
    def received(self) -> Received:
        """Both, of every choice, for errors."""
        first, *more = (Received(one.text, tuple(one.token_ids)) for one in self._choices)
        return replace(first, more_choices=tuple(more))

    def take(self, message: inference_service_pb2.StreamGenerateTextResponse) -> Event:
        """The event in a message, once it has passed its checks.

        Raises:
            ProtocolError: it breaks the contract.
        """
        try:
            return self._take(message)
        except BrokenError as error:
            raise self._protocol_error(error) from None

    def complete(self) -> Generation:
        """The answer, after the stream ended OK.

        Raises:
            ProtocolError: the stream ended without Finish or Usage: a silent truncation.
        """
        try:
            first, *more = self._complete_choices()
            usage = self._complete_usage()
        except BrokenError as error:
            raise self._protocol_error(error) from None
        return Generation(
            first.text,
            first.token_ids,
            first.finish_reason,
            usage,
            self.request_id,
            first.logprobs,
            tuple(more),
        )

    def _take(self, message: inference_service_pb2.StreamGenerateTextResponse) -> Event:
        if message.sequence_number != self._events:
            raise BrokenError("SEQUENCE_GAP", f"event {message.sequence_number} instead of {self._events}")
        self._events += 1
        self.request_id = message.request_id or self.request_id
        choice = self._choice(message.choice_index)
        kind = message.WhichOneof("event")
        if kind == "delta":
            return choice.take_delta(message.delta)
        if kind == "finish":
            return choice.take_finish(message.finish)
        if kind == "usage":
            if self.usage is not None:
                raise BrokenError("EVENT_AFTER_FINISH", "a second Usage")
            self._complete_choices()
            self.usage = _convert.usage(message.usage)
            return UsageReport(self.usage)
        raise BrokenError("UNKNOWN_EVENT", "an event of a kind that this SDK does not know")

    def _choice(self, index: int) -> ChoiceAssembly:
        if not 0 <= index < self._num_choices:
            raise BrokenError("UNKNOWN_CHOICE", f"choice {index} of a request for {self._num_choices}")
        while len(self._choices) <= index:
            self._choices.append(ChoiceAssembly(len(self._choices)))
        return self._choices[index]

    def _complete_choices(self) -> list[Choice]:
        if len(self._choices) < self._num_choices:
            raise BrokenError(
                "MISSING_FINISH",
                f"{len(self._choices)} of {self._num_choices} choices came: the rest is missing",
            )
        return [choice.complete() for choice in self._choices]

    def _complete_usage(self) -> Usage:
        if self.usage is None:
            raise BrokenError("MISSING_USAGE", "the stream ended without Usage")
        return self.usage

    def _protocol_error(self, error: BrokenError) -> ProtocolError:
        return ProtocolError(
            str(error), reason=error.reason, request_id=self.request_id, received=self.received
        )
