"""How far a live request has come, for whoever watches it. Nothing on the token path tells it anything: it looks."""

from collections.abc import Callable
from dataclasses import dataclass

from sps2.v1 import inference_service_pb2 as pb
from sps2_router.handshake import Handshake, Phase
from sps2_router.line import Place

_PHASES = {
    Phase.RESERVING: pb.GENERATION_PHASE_RESERVING,
    Phase.PREFILLING: pb.GENERATION_PHASE_PREFILLING,
    Phase.TRANSFERRING: pb.GENERATION_PHASE_TRANSFERRING,
    Phase.COMMITTED: pb.GENERATION_PHASE_DECODING,
    Phase.FINISHED: pb.GENERATION_PHASE_DECODING,
}


@dataclass
class Progress:
    """Where the parts are that know it; of choices that go on apart, those of the newest attempt."""

    place: Place | None = None
    """In the router's line, while it waits there."""
    handshake: Handshake | None = None
    """Of the attempt that is under way."""
    attempt: int = 0
    """Its number."""
    count_tokens: Callable[[], int] = int
    """Tokens sent to the client."""
    ended: bool = False

    def queued(self, place: Place) -> None:
        """It waits for a place on a prefill group."""
        self.place, self.handshake = place, None

    def begun(self, handshake: Handshake, attempt: int) -> None:
        """An attempt is under way."""
        self.place, self.handshake, self.attempt = None, handshake, attempt

    def snapshot(self) -> pb.WatchGenerationResponse:
        """How far it is now."""
        return pb.WatchGenerationResponse(
            phase=self._phase,
            queue_position=self.place.position if self.place else 0,
            prefill_fraction=self.handshake.prefill_fraction if self.handshake else 0.0,
            num_tokens=self.count_tokens(),
            attempt=self.attempt,
        )

    @property
    def _phase(self) -> pb.GenerationPhase.ValueType:
        if self.ended:
            return pb.GENERATION_PHASE_ENDED
        if self.handshake is None:
            return pb.GENERATION_PHASE_QUEUED
        # A prompt that its group has but has not begun with waits, too.
        if self.handshake.phase is Phase.PREFILLING and self.handshake.prefill_started_at is None:
            return pb.GENERATION_PHASE_QUEUED
        return _PHASES[self.handshake.phase]
