"""Calls about live requests, wherever they are served: cancel and watch.

Looks on this router first, then asks the directory; what another router serves is handed on to it.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from sps2.internal.v1 import kv_directory_service_pb2 as directory_pb
from sps2.v1 import inference_service_pb2 as pb
from sps2_router.admission import Admission, LiveRequest, superseded
from sps2_router.call import Call
from sps2_router.peers import Peers
from sps2_service.errors import Cancelled, NotFound, PermissionDenied

WATCH_INTERVAL_S = 0.1
# A request is looked for during a second: it may just be on its way to another router.
NUM_LOOKS = 10
LOOK_PAUSE_S = 0.1


class LiveRequests:
    """Those of every router."""

    def __init__(self, admission: Admission, peers: Peers) -> None:
        self._admission = admission
        self._peers = peers

    async def cancel(self, request_id: str, call: Call) -> None:
        """Ends a request.

        Raises:
            NotFound: none of this id came to be known within a second.
            PermissionDenied: it is another tenant's.
            Unavailable: it is served by a router that does not answer, or the directory is away.
        """
        found = await self._find(request_id, call)
        if isinstance(found, directory_pb.RequestAdmission):
            await self._peers.cancel(found, call.authorization)
        elif call.superseded:
            found.scope.end(superseded(request_id))
        else:
            found.scope.end(
                Cancelled("CANCELLED", f"request {request_id!r} was cancelled by CancelGeneration")
            )

    async def watch(self, request_id: str, call: Call) -> AsyncGenerator[pb.WatchGenerationResponse]:
        """How far a request is: now, whenever that changes, and that it has ended. Raises like `cancel`."""
        found = await self._find(request_id, call)
        async with aclosing(self._responses(found, call)) as responses:
            async for response in responses:
                yield response

    def _responses(
        self, found: LiveRequest | directory_pb.RequestAdmission, call: Call
    ) -> AsyncGenerator[pb.WatchGenerationResponse]:
        if isinstance(found, LiveRequest):
            return _changes(found)
        return self._peers.watch(found, call.authorization)

    async def _find(self, request_id: str, call: Call) -> LiveRequest | directory_pb.RequestAdmission:
        """The request here, or the call by which another router serves it."""
        for _ in range(1 if call.call_id else NUM_LOOKS):
            live = self._admission.find(request_id)
            if live is not None and call.call_id in {"", live.call_id}:
                if not call.caller.may_touch(live.tenant):
                    raise PermissionDenied("NOT_YOUR_REQUEST", f"request {request_id!r} is another tenant's")
                return live
            if not call.call_id:
                if (elsewhere := await self._peers.find(request_id)) is not None:
                    return elsewhere
                await asyncio.sleep(LOOK_PAUSE_S)
        raise NotFound("REQUEST_NOT_FOUND", f"no live request {request_id!r}")


async def _changes(live: LiveRequest) -> AsyncGenerator[pb.WatchGenerationResponse]:
    said: pb.WatchGenerationResponse | None = None
    while said is None or said.phase != pb.GENERATION_PHASE_ENDED:
        now = live.progress.snapshot()
        if now != said:
            said = now
            yield now
        try:
            await asyncio.wait_for(live.ended.wait(), WATCH_INTERVAL_S)
        except TimeoutError:
            continue
