"""Who may come in: the table of live requests.

Knows ids, nonces and tenants; nothing about the queue, groups or gRPC. One instance per router, used on its event
loop only, so nothing here is locked.
"""

import asyncio
import math
import random
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sps2_router.places import Places
from sps2_router.progress import Progress
from sps2_router.prompt_queue import over_quota
from sps2_router.request_trace import RequestTrace
from sps2_router.scope import CallScope
from sps2_router.tenants import Tenants
from sps2_service.errors import Aborted, AlreadyExists, Unavailable

RETRY_SOON_S = 1.0
"""What is told while this router shuts down: another one may answer at once."""


@dataclass
class LiveRequest:
    """One entry of the table."""

    request_id: str
    nonce: bytes
    scope: CallScope
    """Ends the call that serves it."""
    tenant: str = ""
    """Whose it is; empty where no tokens are asked for."""
    retry: int = 0
    """Which try of the client's call it is."""
    call_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Of the call, among those of all routers."""
    progress: Progress = field(default_factory=Progress)
    """How far it has come."""
    trace: RequestTrace = field(default_factory=RequestTrace)
    """Its spans."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the call is over."""
    last_attempt: int = 0
    """Number of the newest attempt; a call that takes this one's place counts on from here."""

    def next_attempt(self) -> int:
        """Draws an attempt number: 1, 2, 3, ..."""
        self.last_attempt += 1
        return self.last_attempt


class Admission:
    """The requests that this router is serving, and the door before them."""

    def __init__(
        self,
        max_live_requests: int,
        tenants: Tenants,
        now: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """`max_live_requests`: requests between arrival and end, of all tenants.

        `now` is a clock in seconds, `draw` gives numbers in [0, 1).
        """
        self._max_live_requests = max_live_requests
        self._now = now
        self._places = Places(draw)
        self._places_of: defaultdict[str, Places] = defaultdict(lambda: Places(draw))
        """By tenant."""
        self._tenants = tenants
        self._live: dict[str, LiveRequest] = {}
        self._draining = False
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def num_live(self) -> int:
        """Requests that are being served."""
        return len(self._live)

    def drain(self) -> None:
        """From now on nothing new is taken; what is live goes on."""
        self._draining = True

    async def wait_empty(self) -> None:
        """Returns when no request is live; the caller sets the timeout."""
        await self._empty.wait()

    @contextmanager
    def register(
        self, request_id: str, nonce: bytes, scope: CallScope, tenant: str = "", retry: int = 0
    ) -> Iterator[LiveRequest]:
        """Holds the id while the block runs.

        A live request with the same id and nonce (not empty) is ended: this call is its retry, in its place.

        Raises:
            AlreadyExists: the id is live and the nonce is another.
            Aborted: it is the live one that is the retry, of this call, which arrives late.
            Unavailable: draining, or too many live requests.
            ResourceExhausted: too many of its tenant.
        """
        entry = LiveRequest(request_id, nonce, scope, tenant, retry)
        earlier = self._live.get(request_id)
        self._check_door(tenant, replaces=earlier is not None)
        if earlier is not None:
            _supersede(earlier, entry)  # and has its place
        else:
            self._places.take(self._max_live_requests, self._now())
            self._places_of[tenant].take(self._most_of(tenant), self._now())
        self._live[request_id] = entry
        self._empty.clear()
        try:
            yield entry
        finally:
            entry.progress.ended = True
            entry.ended.set()
            if self._live.get(request_id) is entry:
                del self._live[request_id]
                self._places.leave(self._max_live_requests, self._now())
                self._places_of[tenant].leave(self._most_of(tenant), self._now())
            if not self._live:
                self._empty.set()

    def _check_door(self, tenant: str, *, replaces: bool) -> None:
        if self._draining:
            raise Unavailable(
                "DRAINING",
                "this router is shutting down; try again, another one answers",
                retry_after=RETRY_SOON_S,
            )
        if replaces:
            return
        if len(self._live) >= self._max_live_requests:
            raise Unavailable(
                "TOO_MANY_REQUESTS",
                f"{len(self._live)} requests are live, the most that this router takes; try again",
                retry_after=self._places.come_again_s(self._now()),
            )
        own, most = self._places_of[tenant], self._most_of(tenant)
        if own.num_taken >= most:
            raise over_quota(
                tenant,
                "TENANT_TOO_MANY_REQUESTS",
                f"{most} requests of this tenant may be live at once",
                own.come_again_s(self._now()),
            )

    def _most_of(self, tenant: str) -> float:
        """Live requests of a tenant; the file may change at any time."""
        most = self._tenants.limits(tenant).max_live_requests
        return math.inf if most is None else most

    def find(self, request_id: str) -> LiveRequest | None:
        """The live request of this id, if it is here."""
        return self._live.get(request_id)


def request_id_live(request_id: str) -> AlreadyExists:
    """Another call has the id, here or on another router."""
    return AlreadyExists(
        "REQUEST_ID_LIVE",
        f"request id {request_id!r} is live; use another id, or the same nonce to retry that call",
    )


def superseded(request_id: str) -> Aborted:
    """A retry has the place of this call; its client has given the call up."""
    return Aborted("SUPERSEDED", f"a retry of request {request_id!r} took its place")


def _supersede(earlier: LiveRequest, entry: LiveRequest) -> None:
    if not entry.nonce or entry.nonce != earlier.nonce or entry.tenant != earlier.tenant:
        raise request_id_live(entry.request_id)
    if entry.retry < earlier.retry:
        raise superseded(entry.request_id)
    entry.last_attempt = earlier.last_attempt
    earlier.scope.end(superseded(entry.request_id))
