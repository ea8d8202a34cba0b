"""Tells the directory which calls this router serves, and hears of others that serve the same request.

It is told while the request is queued and computed, so it costs no time; before anything goes to the client the answer
is there, or the directory is away and the call goes on by what this router alone knows.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

import structlog

from sps2.internal.v1 import kv_directory_service_pb2 as pb
from sps2_router.admission import LiveRequest, request_id_live, superseded
from sps2_service.errors import ServiceError

LEASE_S = 30.0
RENEW_INTERVAL_S = 10.0
MAX_RENEWALS = 256
REFUSAL_PAUSES_S = (0.05, 0.15, 0.3, 0.0)

log = structlog.get_logger(__name__)


class RequestDirectory(Protocol):
    """What routers need of the directory beside its workers; `DirectoryClient` is one."""

    async def admit(
        self, admissions: Sequence[pb.RequestAdmission], lease_s: float
    ) -> Sequence[pb.AdmissionResult]:
        """Admits calls, or renews their leases."""
        ...

    def dismiss(self, request_id: str, call_id: str) -> None:
        """Forgets an admission, in the background."""
        ...

    async def locate_call(self, request_id: str) -> pb.RequestAdmission | None:
        """The call that serves a request."""
        ...


Supersede = Callable[[pb.RequestAdmission], Awaitable[None]]
"""Ends an earlier call of the same client on another router."""


class Claims:
    """The calls of this router as the directory knows them."""

    def __init__(self, directory: RequestDirectory, address: Callable[[], str]) -> None:
        """`address` is where other routers reach this one."""
        self._directory = directory
        self._address = address
        self._held: dict[str, LiveRequest] = {}

    @asynccontextmanager
    async def hold(
        self, live: LiveRequest, supersede: Supersede
    ) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """Tells of a call while the block runs; what it yields returns once nobody else has the request.

        When another call has it, `live` is ended: with AlreadyExists, or Aborted where that is a later try of the same.
        """
        self._held[live.call_id] = live
        telling = asyncio.create_task(self._tell(live, supersede))
        try:
            yield lambda: asyncio.shield(telling)
        finally:
            del self._held[live.call_id]
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)
            self._directory.dismiss(live.request_id, live.call_id)

    async def run(self) -> None:
        """Keeps the leases, until cancelled."""
        while True:
            await asyncio.sleep(RENEW_INTERVAL_S)
            await self.renew()

    async def renew(self) -> None:
        """Renews every lease; a call whose retry has come to another router is ended."""
        held = list(self._held.values())
        for begin in range(0, len(held), MAX_RENEWALS):
            part = held[begin : begin + MAX_RENEWALS]
            try:
                results = await self._directory.admit(
                    [self._admission(live, renewal=True) for live in part], LEASE_S
                )
            except ServiceError as error:
                log.info("admissions not renewed", count=len(held) - begin, reason=error.reason)
                return
            for live, result in zip(part, results, strict=True):
                if result.status == pb.ADMISSION_STATUS_REFUSED and not self._forget_late(result.other, live):
                    live.scope.end(superseded(live.request_id))

    async def _tell(self, live: LiveRequest, supersede: Supersede) -> None:
        try:
            result = await self._admit(live)
        except ServiceError as error:
            log.info("request not admitted by the directory", request_id=live.request_id, reason=error.reason)
            return
        if result.status == pb.ADMISSION_STATUS_REFUSED:
            live.scope.end(request_id_live(live.request_id))
            await asyncio.Event().wait()  # the call ends, and this with it; nothing is to go to the client
        if result.status != pb.ADMISSION_STATUS_SUPERSEDES:
            return
        if result.other.retry > live.retry:
            live.scope.end(superseded(live.request_id))  # it is this call that arrives late
        elif result.other.router_address != self._address():
            await supersede(result.other)

    async def _admit(self, live: LiveRequest) -> pb.AdmissionResult:
        """Asks again for a while when it is refused: the other call may be over, and its dismissal on the way."""
        for pause in REFUSAL_PAUSES_S:
            (result,) = await self._directory.admit([self._admission(live, renewal=False)], LEASE_S)
            if result.status != pb.ADMISSION_STATUS_REFUSED:
                break
            self._forget_late(result.other, live)
            await asyncio.sleep(pause)
        return result

    def _forget_late(self, other: pb.RequestAdmission, live: LiveRequest) -> bool:
        """Whether the call that has the request, as the directory knows, is over, or an older try of `live`.

        What is told of a call may overtake what is told of the next, and its dismissal what admits it: then it stands
        there alone until its lease ends, in the way of calls that live.
        """
        is_over = other.router_address == self._address() and other.call_id not in self._held
        is_older = bool(live.nonce) and other.nonce == live.nonce and other.retry < live.retry
        if is_over or is_older:
            log.info("late admission forgotten", request_id=live.request_id, call_id=other.call_id)
            self._directory.dismiss(other.request_id, other.call_id)
        return is_over or is_older

    def _admission(self, live: LiveRequest, *, renewal: bool) -> pb.RequestAdmission:
        return pb.RequestAdmission(
            request_id=live.request_id,
            call_id=live.call_id,
            router_address=self._address(),
            nonce=live.nonce,
            renewal=renewal,
            retry=live.retry,
        )
