"""Where the time of a request went. Pure arithmetic over readings of one clock, in seconds."""

from dataclasses import dataclass

from sps2.v1 import generation_pb2
from sps2_router.handshake import Handshake


@dataclass
class Milestones:
    """What the router saw of one request besides the handshake."""

    arrived_at: float
    """The call reached the servicer."""
    first_sent_at: float = 0.0
    """The first token was handed to the client's stream."""
    last_sent_at: float = 0.0
    """The same for the newest token."""
    tbt_p50: float = 0.0
    """Median time between steps, as the decode leader has said last."""
    tbt_p99: float = 0.0
    """99th percentile of the same."""


def timings(milestones: Milestones, handshake: Handshake, num_tokens: int) -> generation_pb2.Timings:
    """Seconds by phase, as generation.proto defines them; for the attempt that succeeded."""
    started_at = _known(handshake.prefill_started_at)
    first_token_at = _known(handshake.first_token_at)
    committed_at = handshake.committed_at
    decoding = milestones.last_sent_at - milestones.first_sent_at
    return generation_pb2.Timings(
        queue=started_at - milestones.arrived_at,
        prefill=first_token_at - started_at,
        # A first token that is also the last one is not followed by a transfer.
        transfer=0.0 if committed_at is None else committed_at - first_token_at,
        ttft=milestones.first_sent_at - milestones.arrived_at,
        tpot=decoding / (num_tokens - 1) if num_tokens > 1 else 0.0,
        e2e=milestones.last_sent_at - milestones.arrived_at,
        tbt_p50=milestones.tbt_p50,
        tbt_p99=milestones.tbt_p99,
    )


def _known(reading: float | None) -> float:
    assert reading is not None, "an answered attempt has passed this point"
    return reading
