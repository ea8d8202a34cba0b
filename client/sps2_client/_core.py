"""What the synchronous and the asynchronous stream share: limits, retries, errors and what has come.

It decides; it never waits and never touches a channel.
"""

import grpc

from sps2.v1 import inference_service_pb2
from sps2_client import _errors as errors
from sps2_client._assembly import Assembly
from sps2_client._options import Deadline, Timeouts, retry_delay
from sps2_client._statuses import CallContext, from_rpc_error
from sps2_client._types import FinishReason, Generation, Usage


class StreamCore:
    """State of one generation across its tries."""

    def __init__(
        self,
        request: inference_service_pb2.StreamGenerateTextRequest,
        address: str,
        timeouts: Timeouts,
        max_retries: int,
    ) -> None:
        self._request = request
        self._address = address
        self._timeouts = timeouts
        self._retries_left = max_retries
        self._retries_made = 0
        self._deadline = Deadline(timeouts.total)
        self._first_deadline = None if timeouts.first_token is None else Deadline(timeouts.first_token)
        self._assembly = Assembly(request.spec.request_id, request.spec.num_choices)
        self._generation: Generation | None = None
        self._error: errors.SPS2Error | None = None

    @property
    def request_id(self) -> str:
        """Id of the request; known before anything is sent."""
        return self._assembly.request_id

    @property
    def text(self) -> str:
        """Text so far; of several choices, the first one's, as with the two below."""
        return self._assembly.text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Tokens so far."""
        return self._assembly.token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None while it has not."""
        return self._assembly.finish_reason

    @property
    def usage(self) -> Usage | None:
        """What the request took; None before the last event."""
        return self._assembly.usage

    def _event_limit(self) -> float | None:
        """Seconds left for the next event; the total limit is the call's own deadline."""
        if self._assembly.started:
            return self._timeouts.between_tokens
        return None if self._first_deadline is None else self._first_deadline.left

    def _timed_out(self) -> errors.Timeout:
        """The error for an event limit that passed."""
        if self._assembly.started:
            message = f"nothing more came within {self._timeouts.between_tokens} s"
            kind: type[errors.Timeout] = errors.BetweenTokensTimeout
        else:
            message = f"nothing came within {self._timeouts.first_token} s"
            kind = errors.FirstTokenTimeout
        return kind(message, request_id=self.request_id, received=self._assembly.received)

    def _closed_error(self) -> errors.Cancelled:
        return errors.Cancelled(
            "the stream was closed before its end",
            code=grpc.StatusCode.CANCELLED,
            request_id=self.request_id,
            received=self._assembly.received,
        )

    def _failure(self, error: grpc.RpcError) -> errors.SPS2Error:
        context = CallContext(
            started=self._assembly.started,
            time_left=self._deadline.left,
            address=self._address,
            request_id=self.request_id,
            received=self._assembly.received,
        )
        return from_rpc_error(error, context)

    def _retry_delay(self, failure: errors.SPS2Error) -> float | None:
        """Seconds until the next try; None when `failure` is final.

        Only a connection lost before the first event is tried again: the router owns every other retry, and
        what was delivered once must not be delivered twice.
        """
        delay = retry_delay(self._retries_made)
        if not isinstance(failure, errors.ConnectionFailed) or not self._retries_left:
            return None
        if self._deadline.left <= delay:
            return None
        self._retries_left -= 1
        self._retries_made += 1
        # The try before may reach the router later than the next one does; it must not take its place then.
        self._request.spec.retry = self._retries_made
        return delay
