"""The leader that holds a cached beginning: has its ranks send it to those of another group. No network of its own.

What is sent is read like any other prompt's beginning, so that the book keeps it meanwhile, and ranks keep its blocks
whatever the book does. To a rank it is an attempt that computes nothing, delivered or cancelled as all others are.
"""

import asyncio
from dataclasses import dataclass, field

import structlog

from sps2.internal.v1 import engine_pb2, placement_pb2, prefill_service_pb2
from sps2_engine.kv_pool import BLOCK_TOKENS
from sps2_layout.wire import unpack_attention
from sps2_prefill_worker.prefix_cache import Prompt
from sps2_prefill_worker.prefix_index import cached_prefix
from sps2_prefill_worker.reuse import PrefixReuse
from sps2_prefill_worker.scheduler import AttemptKey
from sps2_service.errors import Aborted, InvalidArgument, NotFound, Unavailable
from sps2_service.ranks.failures import attempt_failure
from sps2_service.ranks.group import GroupLeader

MAX_SENDS = 64
"""At once; each holds a few orders of every rank's sender."""

log = structlog.get_logger(__name__)


@dataclass
class _Send:
    """A beginning on its way."""

    done: "asyncio.Future[int]"
    """Bytes sent, when every rank has delivered."""
    bytes_sent: dict[int, int] = field(default_factory=dict)
    """By rank that has delivered."""
    cancelled: set[int] = field(default_factory=set)


class PrefixLender:
    """All sends of a leader, on its event loop."""

    def __init__(self, reuse: PrefixReuse) -> None:
        self._reuse = reuse
        self._sends: dict[AttemptKey, _Send] = {}
        self.idle = asyncio.Event()
        """Set while nothing is sent."""
        self.idle.set()

    async def send(self, group: GroupLeader, request: prefill_service_pb2.SendPrefixRequest) -> int:
        """Returns the bytes sent when all is accepted; leaving early gives it up on every rank.

        Args:
            group: formed, and holding its lease.
            request: checked, but for what is cached.

        Raises:
            ServiceError: it is not cached here, or the transfer has failed.
        """
        key = request.attempt.request_id, request.attempt.number
        if key in self._sends:
            raise Aborted("DUPLICATE_ATTEMPT", f"the beginning of {key} is being sent already")
        if len(self._sends) >= MAX_SENDS:
            raise Unavailable(
                "QUEUE_FULL", f"{group.name} sends {MAX_SENDS} prefixes already", retry_after=1.0
            )
        match = self._reuse.lend(key, _prompt_of(request))
        if match is None:
            raise NotFound("PREFIX_NOT_CACHED", f"{group.name} does not hold that prefix (any more)")
        send = self._sends[key] = _Send(asyncio.get_running_loop().create_future())
        self.idle.clear()
        log.info(
            "prefix is sent",
            request_id=key[0],
            attempt=key[1],
            num_tokens=match.num_tokens,
            to=request.placement.group,
        )
        command = engine_pb2.SendCached(
            attempt=request.attempt, placement=request.placement, cached=cached_prefix(match)
        )
        group.broadcast(engine_pb2.EngineCommand(send_cached=command))
        try:
            return await send.done
        finally:
            if self._sends.get(key) is send:
                self._reuse.forget(key)
                self._end(group, key, send)

    def on_report(self, group: GroupLeader, rank: int, report: engine_pb2.PrefillReport) -> None:
        """A rank has come to an end with what it sends."""
        key = report.attempt.request_id, report.attempt.number
        send = self._sends.get(key)
        if send is None:
            return
        if report.HasField("delivered"):
            send.bytes_sent[rank] = report.delivered.kv_transfer_bytes
            if len(send.bytes_sent) == group.size and not send.done.done():
                send.done.set_result(sum(send.bytes_sent.values()))
        elif report.HasField("cancelled"):
            send.cancelled.add(rank)
            if len(send.cancelled) == group.size:
                self._drop(key)

    def on_failed(self, group: GroupLeader, failed: engine_pb2.AttemptFailed) -> None:
        """A rank cannot send its part."""
        send = self._sends.get((failed.attempt.request_id, failed.attempt.number))
        if send is not None and not send.done.done():
            send.done.set_exception(attempt_failure(failed, group.name))

    def on_broken(self, error: Unavailable) -> None:
        """The epoch is over: ranks have forgotten everything."""
        sends, self._sends = self._sends, {}
        self.idle.set()
        for send in sends.values():
            if not send.done.done():
                send.done.set_exception(error)

    def _drop(self, key: AttemptKey) -> None:
        del self._sends[key]
        if not self._sends:
            self.idle.set()

    def _end(self, group: GroupLeader, key: AttemptKey, send: _Send) -> None:
        """Over on all ranks, or to be given up there; until they say so nobody may send under this name."""
        if len(send.bytes_sent) == group.size:
            self._drop(key)
            return
        attempt = placement_pb2.Attempt(request_id=key[0], number=key[1])
        group.broadcast(engine_pb2.EngineCommand(cancel_prefill=engine_pb2.CancelPrefill(attempt=attempt)))


def _prompt_of(request: prefill_service_pb2.SendPrefixRequest) -> Prompt:
    try:
        attention = unpack_attention(request.attention)
    except ValueError as error:
        raise InvalidArgument.of_field("attention", str(error)) from None
    keys = tuple(request.block_hashes)
    return Prompt(attention, keys, len(keys) * BLOCK_TOKENS + 1)
