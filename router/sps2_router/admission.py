"""Who may come in: the table of live requests and the bounded queue.

Knows ids, nonces and token counts; nothing about groups or gRPC. One instance per router, used on its event
loop only, so nothing here is locked.
"""

import asyncio
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sps2_router.progress import Progress
from sps2_router.scope import CallScope
from sps2_service.errors import Aborted, AlreadyExists, Unavailable

RETRY_SOON_S = 1.0


@dataclass(frozen=True)
class AdmissionLimits:
    """What a router takes at once."""

    max_queued_tokens: int = 1_000_000
    """Prompt tokens of requests whose prefill has not begun; one request alone always fits."""
    max_live_requests: int = 1024
    """Requests between arrival and end."""


@dataclass
class LiveRequest:
    """One entry of the table."""

    request_id: str
    nonce: bytes
    scope: CallScope
    """Ends the call that serves it."""
    tenant: str = ""
    """Whose it is; empty where no tokens are asked for."""
    call_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Of the call, among those of all routers."""
    progress: Progress = field(default_factory=Progress)
    """How far it has come."""
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

    def __init__(self, limits: AdmissionLimits) -> None:
        self._limits = limits
        self._live: dict[str, LiveRequest] = {}
        self._num_queued_tokens = 0
        self._draining = False
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def num_live(self) -> int:
        """Requests that are being served."""
        return len(self._live)

    @property
    def num_queued_tokens(self) -> int:
        """Prompt tokens that wait for their prefill."""
        return self._num_queued_tokens

    def drain(self) -> None:
        """From now on nothing new is taken; what is live goes on."""
        self._draining = True

    async def wait_empty(self) -> None:
        """Returns when no request is live; the caller sets the timeout."""
        await self._empty.wait()

    @contextmanager
    def register(
        self, request_id: str, nonce: bytes, scope: CallScope, tenant: str = ""
    ) -> Iterator[LiveRequest]:
        """Holds the id while the block runs.

        A live request with the same id and nonce (not empty) is ended: this call is its retry, in its place.

        Raises:
            AlreadyExists: the id is live and the nonce is another.
            Unavailable: draining, or too many live requests.
        """
        entry = LiveRequest(request_id, nonce, scope, tenant)
        earlier = self._live.get(request_id)
        self._check_door(replaces=earlier is not None)
        if earlier is not None:
            _supersede(earlier, entry)
        self._live[request_id] = entry
        self._empty.clear()
        try:
            yield entry
        finally:
            entry.progress.ended = True
            entry.ended.set()
            if self._live.get(request_id) is entry:
                del self._live[request_id]
            if not self._live:
                self._empty.set()

    def _check_door(self, *, replaces: bool) -> None:
        if self._draining:
            raise Unavailable(
                "DRAINING",
                "this router is shutting down; try again, another one answers",
                retry_after=RETRY_SOON_S,
            )
        if not replaces and len(self._live) >= self._limits.max_live_requests:
            raise Unavailable(
                "TOO_MANY_REQUESTS",
                f"{len(self._live)} requests are live, the most that this router takes; try again",
                retry_after=RETRY_SOON_S,
            )

    @contextmanager
    def queue(self, num_prompt_tokens: int) -> Iterator[None]:
        """Holds room in the queue while the block runs.

        Raises:
            Unavailable: the queue is full; says when to try again.
        """
        limit = self._limits.max_queued_tokens
        if self._num_queued_tokens and self._num_queued_tokens + num_prompt_tokens > limit:
            raise Unavailable(
                "QUEUE_FULL",
                f"{self._num_queued_tokens} prompt tokens are queued and {num_prompt_tokens} more would pass "
                f"the limit of {limit}; try again",
                retry_after=RETRY_SOON_S,
                metadata={"limit": str(limit)},
            )
        self._num_queued_tokens += num_prompt_tokens
        try:
            yield
        finally:
            self._num_queued_tokens -= num_prompt_tokens

    def find(self, request_id: str) -> LiveRequest | None:
        """The live request of this id, if it is here."""
        return self._live.get(request_id)


def request_id_live(request_id: str) -> AlreadyExists:
    """Another call has the id, here or on another router."""
    return AlreadyExists(
        "REQUEST_ID_LIVE",
        f"request id {request_id!r} is live; use another id, or the same nonce to retry that call",
    )


def _supersede(earlier: LiveRequest, entry: LiveRequest) -> None:
    if not entry.nonce or entry.nonce != earlier.nonce or entry.tenant != earlier.tenant:
        raise request_id_live(entry.request_id)
    entry.last_attempt = earlier.last_attempt
    earlier.scope.end(Aborted("SUPERSEDED", f"a retry of request {entry.request_id!r} took its place"))
