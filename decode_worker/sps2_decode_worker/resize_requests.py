"""A resize that somebody asks the leader for: checked, begun, waited for."""

import asyncio
from collections.abc import Iterable
from statistics import median

from sps2.internal.v1 import decode_service_pb2
from sps2_decode_worker.attempts import LiveAttempt
from sps2_decode_worker.resizing import NotMovableError
from sps2_decode_worker.scheduler import DecodeScheduler, NoRoomError
from sps2_decode_worker.spread import TooShortError
from sps2_service.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from sps2_service.ranks.group import GroupLeader

RESIZE_TIMEOUT_S = 60.0
"""Longest wait for a resize; it goes on behind that."""


def find(
    attempts: Iterable[LiveAttempt],
    request: decode_service_pb2.ResizeAttemptRequest,
    group: GroupLeader,
    most: int,
) -> LiveAttempt:
    """The attempt that is meant; its KV may lie on `most` ranks, less than the group has where these split layers.

    Raises:
        InvalidArgument: no such degree or ranks in the group.
        NotFound: no such request here.
        Aborted: another attempt of it is here.
    """
    if not 1 <= request.degree <= most:
        raise InvalidArgument.of_field("degree", f"must be in [1, {most}], the ranks of {group.name}")
    if request.ranks and (
        len(request.ranks) != request.degree
        or len(set(request.ranks)) != request.degree
        or not all(0 <= rank < most for rank in request.ranks)
    ):
        raise InvalidArgument.of_field("ranks", f"must name `degree` different ranks below {most}")
    live = next((one for one in attempts if one.request.attempt.request_id == request.request_id), None)
    if live is None:
        raise NotFound("UNKNOWN_REQUEST", f"no request {request.request_id!r} decodes on {group.name}")
    if request.attempt_number not in (0, live.request.attempt.number):
        raise Aborted(
            "STALE_ATTEMPT", f"attempt {live.request.attempt.number} of {request.request_id!r} is served here"
        )
    return live


def begin(
    scheduler: DecodeScheduler,
    live: LiveAttempt,
    request: decode_service_pb2.ResizeAttemptRequest,
    group: str,
) -> None:
    """Has the scheduler move it from the next plan on.

    Raises:
        ServiceError: it cannot be done, now or ever.
    """
    row = next(iter(live.row.tenant.rows), None)
    if row is None:
        raise _ended(request.request_id)
    try:
        scheduler.resize(row.row_id, request.degree, tuple(request.ranks))
    except NotMovableError as error:
        raise Aborted("NOT_MOVABLE", f"{request.request_id!r} stays where it is: {error}") from None
    except TooShortError:
        raise FailedPrecondition(
            "TOO_SHORT", f"{request.request_id!r} has fewer KV blocks than {request.degree} ranks"
        ) from None
    except NoRoomError:
        raise Unavailable(
            "NO_KV_ROOM", f"decode group {group} has no KV room for that now", retry_after=0.5
        ) from None


async def done(live: LiveAttempt, group: str) -> None:
    """Waits until nothing more of it is under way, and a token has come from where it is then.

    Raises:
        ServiceError: it failed or ended first, or it takes too long.
    """
    try:
        async with asyncio.timeout(RESIZE_TIMEOUT_S):
            while live.row.tenant.resize is not None or live.pace.sequence <= live.moved_with:
                if live.error is not None:
                    raise live.error
                if not live.row.tenant.rows:
                    raise _ended(live.request.attempt.request_id)
                live.changed.clear()
                await live.changed.wait()
    except TimeoutError:
        raise Unavailable(
            "RESIZE", f"decode group {group} still moves its KV after {RESIZE_TIMEOUT_S:g} s", retry_after=1.0
        ) from None


def response(
    live: LiveAttempt, group: str, begun: float, num_blocks_moved: int
) -> decode_service_pb2.ResizeAttemptResponse:
    """What was done since a time in seconds of the event loop's clock; it is done now."""
    before, meanwhile = live.pace.gaps(live.resized_at, begun), live.pace.gaps(begun, float("inf"))
    live.resized_at = asyncio.get_running_loop().time()
    spread = live.row.tenant.spread
    return decode_service_pb2.ResizeAttemptResponse(
        group=group,
        home=spread.home,
        holders=spread.holders,
        num_blocks_moved=num_blocks_moved,
        longest_gap_s=max(meanwhile, default=0.0),
        median_gap_s=median(before) if before else 0.0,
    )


def _ended(request_id: str) -> Aborted:
    return Aborted("REQUEST_ENDED", f"{request_id!r} has all its tokens")
