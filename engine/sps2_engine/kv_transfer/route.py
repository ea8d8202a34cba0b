"""One target as a source sees it: opened in the background, then an outbox, in the end settled and closed.

Belongs to the sender's thread; nothing here blocks.
"""

import logging
from collections.abc import Callable
from typing import Protocol

from sps2.internal.v1.kv_transfer_service_pb2 import OpenRingRequest, OpenRingResponse
from sps2_engine.kv_transfer.base import Link, LinkError, TransferError
from sps2_engine.kv_transfer.grpc import GrpcLink, Handshake, SlabStream
from sps2_engine.kv_transfer.outbox import Outbox
from sps2_engine.kv_transfer.transfer import Share, Transfer

logger = logging.getLogger(__name__)


class NixlLinks(Protocol):
    """Makes one-sided links; `nixl.NixlSource` is the one there is."""

    metadata: bytes
    """What targets need to answer; goes into OpenRing."""

    def link(self, ring: OpenRingResponse, check_tether: Callable[[], None]) -> Link:
        """The way into that ring."""


class Route:
    """The way to one transfer address.

    Args:
        address: host:port of the target's engine.
        request: Introduces this process.
        nixl: This process's NIXL, or None.
        demand_nixl: Fail instead of falling back to gRPC.
        open_timeout_s: For the handshake.
        on_event: Wakes the sender's thread; called from gRPC's threads.
        make_outbox: Given the link and the target's answer.
    """

    def __init__(
        self,
        address: str,
        request: OpenRingRequest,
        nixl: NixlLinks | None,
        demand_nixl: bool,
        open_timeout_s: float,
        on_event: Callable[[], None],
        make_outbox: Callable[[Link, OpenRingResponse], Outbox],
        now: float,
    ) -> None:
        self.address = address
        self._nixl = nixl
        self._demand_nixl = demand_nixl
        self._open_deadline = now + open_timeout_s
        self._make_outbox = make_outbox
        self._handshake = Handshake(address, request, open_timeout_s, on_event)
        self._early: list[Share] = []
        self._outbox: Outbox | None = None
        self.broken: TransferError | None = None
        """Why the route is over, if it is."""

    @property
    def polled(self) -> bool:
        """Whether answers are due that wake nobody."""
        return self._outbox is not None and self._outbox.waiting and self._outbox.link.polled

    @property
    def waiting(self) -> bool:
        """Whether a timeout is running."""
        return self._outbox is None or self._outbox.waiting

    def add(self, share: Share, now: float) -> None:
        """Sends a share, once the route is open; fails its transfer if the route is over."""
        if self.broken is not None:
            share.transfer.fail(self.broken)
        elif self._outbox is None:
            self._early.append(share)
        else:
            self._outbox.add(share, now)

    def step(self, now: float, count_bytes: Callable[[int], None]) -> int:
        """Does what can be done now; how much that was. A failure goes into `broken`."""
        if self.broken is not None:
            return 0
        try:
            if self._outbox is None:
                self._outbox = self._try_open(now)
            return self._outbox.pump(now, count_bytes) if self._outbox else 0
        except LinkError as error:
            self._break(TransferError("PEER_UNREACHABLE", f"{self.address}: {error}"))
        except TransferError as error:
            self._break(error)
        return 1

    def _try_open(self, now: float) -> Outbox | None:
        opened = self._handshake.result()
        if opened is None:
            if now >= self._open_deadline:
                raise LinkError("the handshake timed out")
            return None
        outbox = self._make_outbox(self._link(*opened), opened[0])
        for share in self._early:
            outbox.add(share, now)
        self._early.clear()
        return outbox

    def _link(self, ring: OpenRingResponse, stream: SlabStream) -> Link:
        one_sided = self._nixl is not None and bool(ring.agent_metadata)
        if self._demand_nixl and not one_sided:
            raise TransferError("TRANSPORT_UNAVAILABLE", f"{self.address} does not offer NIXL")
        logger.info("KV goes to %s by %s", self.address, "NIXL" if one_sided else "gRPC")
        if self._nixl is not None and one_sided:
            return self._nixl.link(ring, stream.check)
        return GrpcLink(stream)

    def _break(self, error: TransferError) -> None:
        logger.info("the way to %s is gone: %s", self.address, error)
        self.broken = error
        self._early.clear()
        if self._outbox is not None:
            self._outbox.fail(error)

    def reads(self, transfer: Transfer) -> bool:
        """Whether blocks of that transfer may still be read."""
        return self._outbox is not None and self._outbox.reads(transfer)

    def try_close(self) -> bool:
        """Closes the route if nothing reads the arena for it any more; whether it did."""
        if self._outbox is not None:
            if not self._outbox.settled():
                return False
            self._outbox.link.close()
        self._handshake.close()
        return True
