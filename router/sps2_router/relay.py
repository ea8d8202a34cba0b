"""Tokens of one choice to the events that the client gets. Pure: no gRPC, no clock.

Checks that token indices are 0, 1, 2, ... (G2), turns tokens into text, keeps count and digest for Finish.
"""

import hashlib
import struct
from collections.abc import Sequence

from sps2.v1 import generation_pb2, inference_service_pb2
from sps2_router.detokenizer import Detokenizer
from sps2_service.errors import Internal

Event = inference_service_pb2.StreamGenerateTextResponse


class ChoiceRelay:
    """One stream's events, in order. `tokens` any number of times, then `finish`, then `usage`."""

    def __init__(self, request_id: str, detokenizer: Detokenizer, stop_token_ids: Sequence[int]) -> None:
        """`stop_token_ids` are given as tokens but never as text."""
        self._request_id = request_id
        self._detokenizer = detokenizer
        self._stop_token_ids = frozenset(stop_token_ids)
        self._digest = hashlib.sha256()
        self._num_events = 0
        self.num_tokens = 0

    def tokens(self, first_index: int, token_ids: Sequence[int]) -> Event:
        """The event for the next tokens.

        Raises:
            Internal: `first_index` is not the next one: a token is missing or doubled.
        """
        if first_index != self.num_tokens or not token_ids:
            raise Internal(
                "TOKEN_ORDER",
                f"got {len(token_ids)} tokens from index {first_index}, the next is {self.num_tokens}",
            )
        self._digest.update(struct.pack(f"<{len(token_ids)}i", *token_ids))
        self.num_tokens += len(token_ids)
        text = self._detokenizer.push(one for one in token_ids if one not in self._stop_token_ids)
        return self._event(
            delta=generation_pb2.Delta(text=text, token_ids=token_ids, first_index=first_index)
        )

    def finish(self, reason: generation_pb2.FinishReason.ValueType) -> list[Event]:
        """The last text if some was held back, and the Finish."""
        if reason == generation_pb2.FINISH_REASON_UNSPECIFIED:
            raise Internal("NO_FINISH_REASON", "the worker ended the choice without saying why")
        events = []
        if rest := self._detokenizer.flush():
            delta = generation_pb2.Delta(text=rest, first_index=self.num_tokens)
            events.append(self._event(delta=delta))
        finish = generation_pb2.Finish(
            reason=reason, token_count=self.num_tokens, digest=self._digest.digest()
        )
        return [*events, self._event(finish=finish)]

    def usage(self, usage: generation_pb2.Usage) -> Event:
        """The last event."""
        return self._event(usage=usage)

    def _event(
        self,
        *,
        delta: generation_pb2.Delta | None = None,
        finish: generation_pb2.Finish | None = None,
        usage: generation_pb2.Usage | None = None,
    ) -> Event:
        number = self._num_events
        self._num_events += 1
        return Event(
            sequence_number=number,
            request_id="" if number else self._request_id,
            delta=delta,
            finish=finish,
            usage=usage,
        )
