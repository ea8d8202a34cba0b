"""The spans of one request as the router has them: the request, and the phases of its attempts without gaps.

Phases are read off the handshake once an attempt is over. Where a request is not recorded, all of this does nothing.
"""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from opentelemetry.trace import SpanKind

from sps2.v1 import generation_pb2
from sps2_router.handshake import Handshake, Phase
from sps2_router.types import GroupPair, Request
from sps2_service import span_names as names
from sps2_service.errors import ServiceError
from sps2_service.trace_context import Place, metadata_of
from sps2_service.tracing import Span, Tracing, UnixClock


@dataclass(frozen=True)
class Part:
    """A phase of an attempt; times are the router's clock, in seconds."""

    name: str
    begin: float
    end: float


def parts(waits_since: float, handshake: Handshake | None, ended_at: float) -> list[Part]:
    """The phases that an attempt has come to, one after another; in the last of them it ended.

    Args:
        waits_since: when the request came, or its attempt before had ended.
        handshake: what was heard of the attempt; None when there was no group for it.
        ended_at: when it ended.
    """
    begins: list[tuple[str, float | None]] = [(names.QUEUE, waits_since)]
    if handshake is not None:
        begins.append((names.PREFILL, handshake.prefill_started_at))
        if handshake.phase is not Phase.FINISHED:  # its first token was its last: nothing is waited for
            begins.append((names.TRANSFER, handshake.first_token_at))
        begins.append((names.DECODE, handshake.committed_at))
    known = [(name, begin) for name, begin in begins if begin is not None]
    ends = [begin for _, begin in known[1:]] + [ended_at]
    return [Part(name, begin, end) for (name, begin), end in zip(known, ends, strict=True)]


class RequestTrace:
    """A request's own span, made when the block ends; a failure that leaves it is the span's."""

    def __init__(
        self, tracing: Tracing | None = None, caller: Place | None = None, arrived_at: float = 0.0
    ) -> None:
        """Made when the request arrives, at `arrived_at` by the event loop's clock.

        `caller` is the client's span, if it has one; without `tracing` nothing is recorded.
        """
        self._tracing = tracing
        self._caller = caller
        self.arrived_at = arrived_at
        """By the event loop's clock."""
        self._clock = UnixClock(arrived_at)
        self._name = "generate"
        self._attributes: dict[str, Any] = {names.PROVIDER: "sps2"}
        self.place = tracing.request(caller) if tracing else None

    def asked(self, spec: generation_pb2.GenerationSpec, request_id: str, model: str) -> None:
        """What is asked for, before it is looked into."""
        operation = "chat" if spec.HasField("chat") else "text_completion"
        self._name = f"{operation} {model}"
        self._attributes |= {
            names.OPERATION: operation,
            names.REQUEST_MODEL: model,
            names.RESPONSE_ID: request_id,
            names.REQUEST_ID: request_id,
        }

    def resolved(self, request: Request) -> None:
        """What it has become; of its text only how long it is."""
        choice = request.choice
        self._attributes |= {
            names.INPUT_TOKENS: request.num_prompt_tokens,
            names.MAX_TOKENS: choice.max_tokens,
            names.TEMPERATURE: choice.temperature,
            names.TOP_P: choice.top_p,
            names.CHOICE_COUNT: choice.num_choices,
            names.ATTENTION: request.attention_profile,
        }

    def answered(
        self,
        usage: generation_pb2.Usage,
        reasons: Iterable[generation_pb2.FinishReason.ValueType],
    ) -> None:
        """What it took."""
        self._attributes |= {
            names.OUTPUT_TOKENS: usage.output_tokens,
            names.CACHED_TOKENS: usage.cached_tokens,
            names.COLLECTIVE_BYTES: usage.bytes.collective,
            names.KV_TRANSFER_BYTES: usage.bytes.kv_transfer,
            names.FINISH_REASONS: [
                generation_pb2.FinishReason.Name(one).removeprefix("FINISH_REASON_").lower()
                for one in reasons
            ],
        }

    def attempt(self, waits_since: float | None) -> "AttemptTrace":
        """The spans of the next attempt; `waits_since` None: since the request came."""
        since = self.arrived_at if waits_since is None else waits_since
        return AttemptTrace(self._tracing, self.place, self._clock, since)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> None:
        if self._tracing is None or self.place is None:
            return
        now = asyncio.get_running_loop().time()
        self._tracing.take(
            Span(
                self._name,
                self.place,
                self._caller,
                self._clock.ns(self.arrived_at),
                self._clock.ns(now),
                self._attributes,
                SpanKind.SERVER,
                _reason(error),
            )
        )


class AttemptTrace:
    """The phases of one attempt, made when the block ends. Calls to the leaders are made beneath two of them."""

    def __init__(
        self, tracing: Tracing | None, request: Place | None, clock: UnixClock, waits_since: float
    ) -> None:
        """Beneath the span at `request`, whose times are by `clock`."""
        self._tracing = tracing
        self._request = request
        self._clock = clock
        self._waits_since = waits_since
        self._places: dict[str, Place] = {}
        if tracing is not None and request is not None:
            self._places = {name: tracing.beneath(request) for name in _PHASES}
        self._attributes: dict[str, Any] = {}
        self._groups: dict[str, str] = {}
        self._handshake: Handshake | None = None
        self._error: BaseException | None = None

    def begun(self, number: int, pair: GroupPair, handshake: Handshake) -> None:
        """Groups have been found for it."""
        self._attributes = {names.ATTEMPT: number}
        self._groups = {names.PREFILL: pair.prefill.name, names.DECODE: pair.decode.name}
        self._handshake = handshake

    def failed(self, error: ServiceError) -> None:
        """It has ended so; the block need not."""
        self._error = error

    def metadata(self, phase: str) -> Sequence[tuple[str, str]]:
        """For the call to the leader of that phase's group."""
        return metadata_of(self._places.get(phase))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> None:
        if self._tracing is None or not self._places or (error is None and self._had_no_room):
            return
        now = asyncio.get_running_loop().time()
        found = parts(self._waits_since, self._handshake, now)
        for part in found:
            is_last = part is found[-1]
            self._tracing.take(
                Span(
                    part.name,
                    self._places[part.name],
                    self._request,
                    self._clock.ns(part.begin),
                    self._clock.ns(part.end),
                    self._attributes | self._facts(part.name),
                    _PHASES[part.name],
                    _reason(error or self._error) if is_last else "",
                )
            )

    @property
    def _had_no_room(self) -> bool:
        """It ended before it had room: it waits on, and the next attempt's queue begins where this one's did."""
        return self._handshake is not None and self._handshake.phase is Phase.RESERVING

    def _facts(self, phase: str) -> dict[str, Any]:
        facts: dict[str, Any] = {names.GROUP: self._groups[phase]} if phase in self._groups else {}
        delivered = self._handshake.delivered if self._handshake else None
        if delivered is not None and phase == names.PREFILL:
            facts |= {
                names.COLLECTIVE_BYTES: delivered.collective_bytes,
                names.EXPOSED_SECONDS: delivered.exposed_s,
            }
        elif delivered is not None and phase == names.TRANSFER:
            facts[names.KV_TRANSFER_BYTES] = delivered.kv_transfer_bytes
        return facts


_PHASES = {
    names.QUEUE: SpanKind.INTERNAL,
    names.PREFILL: SpanKind.CLIENT,
    names.TRANSFER: SpanKind.INTERNAL,
    names.DECODE: SpanKind.CLIENT,
}


def _reason(error: BaseException | None) -> str:
    """Of an error its name only: what it says may quote its request."""
    if error is None:
        return ""
    if isinstance(error, ServiceError):
        return error.reason
    return "CANCELLED" if isinstance(error, asyncio.CancelledError) else "INTERNAL"
