"""What came with a call beside its request: its time, who makes it, and what other routers add when they hand it on."""

from dataclasses import dataclass
from typing import Any

import grpc

from sps2_service.caller import ANYBODY, Caller, current_caller

CALL_KEY = "sps2-call-id"
SUPERSEDED_KEY = "sps2-superseded"
AUTHORIZATION = "authorization"


@dataclass(frozen=True)
class Call:
    """One call as it came."""

    time_left: float | None = None
    """Seconds until the client's deadline; None without one."""
    caller: Caller = ANYBODY
    """Who makes it."""
    authorization: str = ""
    """The client's credentials, to be handed on to another router."""
    call_id: str = ""
    """The very call that this is about, when another router has handed it on."""
    superseded: bool = False
    """Whether a retry takes that call's place."""

    @classmethod
    def of(cls, context: "grpc.aio.ServicerContext[Any, Any]") -> "Call":
        """That of a servicer's method."""
        metadata = {
            key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)
        }
        return cls(
            time_left=context.time_remaining(),
            caller=current_caller.get(),
            authorization=metadata.get(AUTHORIZATION, ""),
            call_id=metadata.get(CALL_KEY, ""),
            superseded=SUPERSEDED_KEY in metadata,
        )
