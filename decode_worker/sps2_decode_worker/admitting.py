"""Which attempts a decode group takes, and the room that it gives them, or a place in line.

Knows requests and the scheduler; nothing of ranks, steps or tokens.
"""

import asyncio
from collections.abc import Iterable

from sps2.internal.v1 import decode_service_pb2
from sps2_decode_worker.attempts import LiveAttempt
from sps2_decode_worker.messages import BLOCK_TOKENS
from sps2_decode_worker.placing import Asked, max_new_tokens
from sps2_decode_worker.scheduler import DecodeScheduler, NeverFitsError, NoRoomError
from sps2_decode_worker.sharing import NO_PREFIX, Prefix
from sps2_decode_worker.tenants import Row
from sps2_layout.wire import unpack_attention
from sps2_service.errors import Aborted, FailedPrecondition, InvalidArgument, Unavailable
from sps2_service.ranks.group import GroupLeader, GroupState
from sps2_service.turns import turn_us

LINE_LEASE_S = 5.0
"""How long a request that found no room keeps its place in line without asking again: several of its pauses."""


def check_group(group: GroupLeader) -> None:
    """Raises Unavailable while the group is not formed, or is fenced."""
    if group.state is not GroupState.FORMED:
        why = f"decode group {group.name} is not ready ({group.missing})"
        raise Unavailable("GROUP_NOT_READY", why, retry_after=1.0)
    group.check_lease()


def check_request(
    request: decode_service_pb2.ReserveKv, group: str, model_hash: str, attempts: Iterable[LiveAttempt]
) -> None:
    """Whether it is for this group's model, and none of the attempts that are here.

    Raises:
        ServiceError: it is not.
    """
    if request.model_hash != model_hash:
        raise FailedPrecondition(
            "MODEL_HASH_MISMATCH", f"decode group {group} serves another model than prefill"
        )
    if any(live.request.attempt == request.attempt for live in attempts):
        raise Aborted(
            "DUPLICATE_ATTEMPT",
            f"attempt {request.attempt.number} of request {request.attempt.request_id!r} is served already: "
            "two live requests may not share an id",
        )


class Line:
    """Places in line of requests that found no room; each is kept as long as its request asks again."""

    def __init__(self, group: str) -> None:
        """`group` is its name."""
        self._group = group
        self._leases: dict[str, asyncio.TimerHandle] = {}

    def room(self, scheduler: DecodeScheduler, request: decode_service_pb2.ReserveKv) -> list[Row]:
        """Rows of an attempt, one for each choice.

        Raises:
            ServiceError: there is no room now (it stands in line then), or never.
        """
        asked = Asked(
            request.num_prompt_tokens,
            max_new_tokens(request.choice),
            max(1, request.choice.num_choices),
            _prefix(request),
        )
        name = _name_in_line(request)
        if (lease := self._leases.pop(name, None)) is not None:
            lease.cancel()
        try:
            return scheduler.reserve(asked, turn_us(request.asked_at_us, request.priority), name)
        except NeverFitsError:
            raise FailedPrecondition(
                "REQUEST_TOO_LARGE",
                f"{asked.num_tokens} prompt tokens and {asked.num_choices} times {asked.max_new_tokens} more "
                f"need more KV than decode group {self._group} has: raise --kv-tokens or use more ranks",
            ) from None
        except NoRoomError:
            loop = asyncio.get_running_loop()
            self._leases[name] = loop.call_later(LINE_LEASE_S, self._leave, scheduler, name)
            raise Unavailable(
                "NO_KV_ROOM", f"decode group {self._group} has no KV room now", retry_after=0.5
            ) from None

    def _leave(self, scheduler: DecodeScheduler, name: str) -> None:
        del self._leases[name]
        scheduler.leave_line(name)


def _prefix(request: decode_service_pb2.ReserveKv) -> Prefix:
    """By what its blocks are compared with those of others.

    Raises:
        InvalidArgument: it names blocks that it does not have, or no mask.
    """
    if len(request.block_hashes) > request.num_prompt_tokens // BLOCK_TOKENS:
        raise InvalidArgument.of_field("block_hashes", "there is one for each full block of the prompt")
    if not request.block_hashes:
        return NO_PREFIX
    try:
        attention = unpack_attention(request.attention)
    except ValueError as error:
        raise InvalidArgument.of_field("attention", str(error)) from None
    # Dense KV depends on nothing but the tokens before it; under CSA, on the whole layout.
    return Prefix(attention if attention.layout else None, tuple(request.block_hashes))


def _name_in_line(request: decode_service_pb2.ReserveKv) -> str:
    """The same for all attempts at a request, or at one of its choices that goes on by itself."""
    return f"{request.attempt.request_id}/{request.choice.sampling.first_choice}"
