"""Gathers one stream and holds it to its contract (G1, G2). Pure: no channel, no clock.

Checked: events numbered without gaps, token indices 0..n-1 once each, exactly one Finish whose count and
digest match the tokens, Usage last. What fails a check never reaches the caller as an answer.
"""

import hashlib
import struct
from collections.abc import Sequence

from sps2.v1 import generation_pb2, inference_service_pb2
from sps2_client import _convert
from sps2_client._errors import ProtocolError, Received
from sps2_client._types import Event, Finished, FinishReason, Generation, TextDelta, Usage, UsageReport


def token_digest(token_ids: Sequence[int]) -> bytes:
    """SHA-256 over the ids as little-endian int32."""
    return hashlib.sha256(struct.pack(f"<{len(token_ids)}i", *token_ids)).digest()


class Assembly:
    """One stream so far."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.finish_reason: FinishReason | None = None
        self.usage: Usage | None = None
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._events = 0

    @property
    def started(self) -> bool:
        """Whether any event has come."""
        return self._events > 0

    @property
    def text(self) -> str:
        """Text so far."""
        return "".join(self._texts)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Tokens so far."""
        return tuple(self._token_ids)

    @property
    def received(self) -> Received:
        """Both, for errors."""
        return Received(self.text, self.token_ids)

    def take(self, message: inference_service_pb2.StreamGenerateTextResponse) -> Event:
        """The event in a message, once it has passed its checks.

        Raises:
            ProtocolError: it breaks the contract.
        """
        if message.sequence_number != self._events:
            raise self._broken("SEQUENCE_GAP", f"event {message.sequence_number} instead of {self._events}")
        if message.choice_index != 0:
            raise self._broken("UNKNOWN_CHOICE", f"choice {message.choice_index} of a request for one")
        self._events += 1
        self.request_id = message.request_id or self.request_id
        kind = message.WhichOneof("event")
        if kind == "delta":
            return self._take_delta(message.delta)
        if kind == "finish":
            return self._take_finish(message.finish)
        if kind == "usage":
            return self._take_usage(message.usage)
        raise self._broken("UNKNOWN_EVENT", "an event of a kind that this SDK does not know")

    def complete(self) -> Generation:
        """The answer, after the stream ended OK.

        Raises:
            ProtocolError: the stream ended without Finish or Usage: a silent truncation.
        """
        if self.finish_reason is None:
            raise self._broken("MISSING_FINISH", "the stream ended without Finish: the answer is truncated")
        if self.usage is None:
            raise self._broken("MISSING_USAGE", "the stream ended without Usage")
        return Generation(self.text, self.token_ids, self.finish_reason, self.usage, self.request_id)

    def _take_delta(self, delta: generation_pb2.Delta) -> TextDelta:
        self._refuse_after_finish("delta")
        count = len(self._token_ids)
        # Text may come without tokens (the last characters that were held back); then the index says nothing.
        if delta.token_ids and delta.first_index != count:
            raise self._broken("TOKEN_INDEX", f"token index {delta.first_index} instead of {count}")
        self._texts.append(delta.text)
        self._token_ids.extend(delta.token_ids)
        return TextDelta(delta.text, tuple(delta.token_ids), count)

    def _take_finish(self, finish: generation_pb2.Finish) -> Finished:
        self._refuse_after_finish("Finish")
        count = len(self._token_ids)
        if finish.token_count != count:
            raise self._broken("TOKEN_COUNT", f"Finish counts {finish.token_count} tokens, {count} came")
        if finish.digest != token_digest(self._token_ids):
            raise self._broken("DIGEST", "the digest of Finish is not that of the tokens that came")
        reason = _convert.FINISH_REASONS.get(finish.reason)
        if reason is None:
            raise self._broken("UNKNOWN_EVENT", f"finish reason {finish.reason}")
        self.finish_reason = reason
        return Finished(reason, count)

    def _take_usage(self, message: generation_pb2.Usage) -> UsageReport:
        if self.finish_reason is None:
            raise self._broken("MISSING_FINISH", "Usage came before Finish")
        if self.usage is not None:
            raise self._broken("EVENT_AFTER_FINISH", "a second Usage")
        self.usage = _convert.usage(message)
        return UsageReport(self.usage)

    def _refuse_after_finish(self, name: str) -> None:
        if self.finish_reason is not None:
            raise self._broken("EVENT_AFTER_FINISH", f"a {name} after the Finish")

    def _broken(self, reason: str, message: str) -> ProtocolError:
        return ProtocolError(message, reason=reason, request_id=self.request_id, received=self.received)
