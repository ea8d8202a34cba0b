r"""The order of events of one attempt up to its commit point. Pure: no gRPC, no clock of its own.

    RESERVING --placement--> PREFILLING --first_token--> TRANSFERRING --committed--> COMMITTED
                                  \--first_token that finishes every choice--> FINISHED

`attempt` feeds it what the two leaders say and does what comes back; what is out of order is a worker's bug.
"""

from dataclasses import dataclass, field
from enum import Enum, auto

from sps2.internal.v1 import decode_service_pb2, placement_pb2, prefill_service_pb2
from sps2_layout.placement import covers
from sps2_service.errors import Internal


class Phase(Enum):
    """Where an attempt is."""

    RESERVING = auto()
    """Waits for room on the decode group."""
    PREFILLING = auto()
    """The prompt is queued or computed."""
    TRANSFERRING = auto()
    """The first token is there, KV is on its way."""
    COMMITTED = auto()
    """The decode group holds and has verified all of it."""
    FINISHED = auto()
    """The first token of every choice was also its last; the decode group is not needed."""


class Step(Enum):
    """What is to be done next."""

    NOTHING = auto()
    PREFILL = auto()
    """Call the prefill leader with the placement."""
    START = auto()
    """Hand the first token to the decode leader."""
    ANSWER = auto()
    """Write to the client: the attempt will not be repeated."""


@dataclass
class Handshake:
    """One attempt's state; times are the caller's clock, in seconds."""

    num_prompt_tokens: int
    num_choices: int = 1
    phase: Phase = Phase.RESERVING
    placement: placement_pb2.Placement | None = None
    first_token: prefill_service_pb2.FirstToken | None = None
    prefill_started_at: float | None = None
    prefill_fraction: float = 0.0
    """Of the prompt, as last heard."""
    first_token_at: float | None = None
    committed_at: float | None = None
    delivered: prefill_service_pb2.PrefillDelivered = field(
        default_factory=prefill_service_pb2.PrefillDelivered
    )
    """What prefill summed up; all zero until it has."""

    def on_decode(self, response: decode_service_pb2.DecodeResponse, now: float) -> Step:
        """Takes an event of the decode leader.

        Raises:
            Internal: it came out of order.
        """
        event = response.WhichOneof("event")
        if event == "placement" and self.phase is Phase.RESERVING:
            self._check_placement(response.placement)
            self.placement = response.placement
            self.phase = Phase.PREFILLING
            return Step.PREFILL
        if event == "committed" and self.phase is Phase.TRANSFERRING:
            self.phase = Phase.COMMITTED
            self.committed_at = now
            return Step.ANSWER
        raise self._out_of_order("decode", event)

    def on_prefill(self, response: prefill_service_pb2.PrefillResponse, now: float) -> Step:
        """Takes an event of the prefill leader.

        Its ranks report over different connections: `started` and `progress` of one may come after the first
        token of another and then mean nothing; `delivered` may come before or after the commit.

        Raises:
            Internal: it came out of order.
        """
        event = response.WhichOneof("event")
        if event == "delivered" and self.first_token is not None:
            self.delivered = response.delivered
            return Step.NOTHING
        if self.placement is not None and event in {"started", "progress"}:
            self._note_start(now)
            self.prefill_fraction = max(self.prefill_fraction, response.progress.fraction)
            return Step.NOTHING
        if self.phase is Phase.PREFILLING and event == "first_token":
            self._note_start(now)
            return self._on_first_token(response.first_token, now)
        raise self._out_of_order("prefill", event)

    def _note_start(self, now: float) -> None:
        if self.prefill_started_at is None:
            self.prefill_started_at = now

    def _on_first_token(self, token: prefill_service_pb2.FirstToken, now: float) -> Step:
        choices = [token, *token.more_choices]
        if len(choices) != self.num_choices:
            raise Internal("CHOICE_COUNT", f"prefill sampled {len(choices)} of {self.num_choices} choices")
        self.first_token = token
        self.prefill_fraction = 1.0
        self.first_token_at = now
        if all(choice.finish_reason for choice in choices):
            self.phase = Phase.FINISHED
            return Step.ANSWER
        self.phase = Phase.TRANSFERRING
        return Step.START

    def _check_placement(self, placement: placement_pb2.Placement) -> None:
        if not covers(placement, self.num_prompt_tokens):
            raise Internal(
                "BAD_PLACEMENT",
                f"the decode leader's placement does not cover {self.num_prompt_tokens} tokens",
            )

    def _out_of_order(self, who: str, event: str | None) -> Internal:
        return Internal(
            "OUT_OF_ORDER", f"the {who} leader sent {event or 'an empty event'} while {self.phase.name}"
        )
