"""The source's side of KV transfer, one per prefill engine: its thread, its routes, its transfers.

The engine's compute thread never waits here: every call leaves an order and returns. The sender's thread
carries orders out, opens routes in the background, and sleeps until something is due.
"""

import itertools
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Final

from sps2.internal.v1.kv_transfer_service_pb2 import KvFormat, OpenRingRequest, OpenRingResponse
from sps2.internal.v1.placement_pb2 import Attempt, Placement
from sps2_engine.kv_pool import KvArena
from sps2_engine.kv_transfer.base import Link, TransferError, TransportChoice
from sps2_engine.kv_transfer.nixl import NixlSource, NixlUnavailableError
from sps2_engine.kv_transfer.outbox import Outbox
from sps2_engine.kv_transfer.relayout import num_cells, shares
from sps2_engine.kv_transfer.route import NixlLinks, Route
from sps2_engine.kv_transfer.rows import UsedRows
from sps2_engine.kv_transfer.slab import ArenaBytes
from sps2_engine.kv_transfer.transfer import Share, Transfer
from sps2_layout.layout import Span

logger = logging.getLogger(__name__)

_SHORTEST_PAUSE_S: Final = 0.0002
_LONGEST_PAUSE_S: Final = 0.001
_WAITING_PAUSE_S: Final = 0.05
_IDLE_PAUSE_S: Final = 0.5
_CLOSE_TIMEOUT_S: Final = 2.0


class KvSender:
    """Sends KV out of this engine's arena, while later layers are computed.

    Args:
        arena: Where KV is read; host memory. With NIXL it is registered once and slabs leave it uncopied. It
            may hold a range of the model's KV heads: those are what this source sends.
        kv_format: Must describe the arena.
        source_name: For people ("prefill-0/1"); a target keeps one live ring per name.
        source_incarnation: Life of this engine process.
        transport: "auto" uses NIXL where both sides have it, else gRPC; "nixl" demands it; "grpc" never does.
        open_timeout_s: For the handshake with a target.
        ack_timeout_s: How long a target may answer nothing while slabs wait for it.
        may_send: Asked by the sender's thread before it posts; False fails what is going on with FENCED.

    Raises:
        ValueError: the format does not describe the arena.
        NixlUnavailableError: with "nixl" only.

    Attributes:
        bytes_posted: Bytes of slabs posted since the start, resends included.
    """

    def __init__(
        self,
        arena: KvArena,
        kv_format: KvFormat,
        source_name: str,
        source_incarnation: str,
        transport: TransportChoice = "auto",
        *,
        open_timeout_s: float = 5.0,
        ack_timeout_s: float = 10.0,
        may_send: Callable[[], bool] = lambda: True,
    ) -> None:
        self._bytes = ArenaBytes(arena, kv_format)
        if not self._bytes.in_host_memory:
            raise ValueError(f"KV leaves from host memory, the arena lies on {arena.k.device}")
        self._nixl = _make_nixl(transport, source_incarnation, arena)
        self._demand_nixl = transport == "nixl"
        self._open_timeout_s = open_timeout_s
        self._ack_timeout_s = ack_timeout_s
        self._may_send = may_send
        self._introduction = OpenRingRequest(
            source_incarnation=source_incarnation,
            source_name=source_name,
            format=kv_format,
            agent_metadata=self._nixl.metadata if self._nixl else b"",
        )
        self.bytes_posted = 0
        self._orders: deque[Callable[[], None]] = deque()
        self._orders_lock = threading.Lock()
        self._orders_closed = False
        self._wake = threading.Event()
        self._closing = False
        # From here on, the thread's own.
        self._routes: dict[str, Route] = {}
        self._transfers: list[Transfer] = []
        self._quieting: list[tuple[Transfer, Future[None]]] = []
        # By target process: a target takes rising numbers only, also after a link to it was made anew.
        self._sequences: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)
        self._thread = threading.Thread(target=self._run, name="kv-sender", daemon=True)
        self._thread.start()

    def begin(
        self,
        attempt: Attempt,
        placement: Placement,
        spans: Sequence[Span],
        sources: Sequence[UsedRows],
    ) -> Transfer:
        """Starts a transfer of these tokens, all heads of the arena; the ways to its targets open at once.

        Args:
            attempt: For messages; what targets check is each shard's fence.
            placement: Which target takes which tokens.
            spans: Tokens that this rank sends, in order and disjoint. Without any the transfer is done at once.
            sources: Where they lie in this rank's arena, perhaps among others; each of the spans lies within one
                used span of one of these, and none of another. Their blocks are to be freed when `done` has a
                result, or when what `abort` returned has.

        Returns:
            The handle. Every failure comes by its `done`, as TransferError.
        """
        transfer = Transfer(attempt, placement, tuple(sources))
        try:
            transfer.parts = shares(placement, spans, self._bytes.heads, self._bytes.num_model_heads)
            for part in transfer.parts:
                transfer.runs(part)
        except ValueError as error:
            transfer.fail(TransferError("BAD_PLACEMENT", str(error)))
            return transfer
        transfer.num_missing = self._bytes.num_layers * num_cells(transfer.parts)
        transfer.finish_if_complete()
        if not self._order(lambda: self._begin(transfer)):
            transfer.fail(_closed())
        return transfer

    def layer_ready(self, transfer: Transfer, layer: int) -> None:
        """K and V of that layer are in the arena for good: it leaves. Never waits.

        Raises:
            ValueError: there is no such layer, or it was ready before.
        """
        if layer in transfer.layers or not 0 <= layer < self._bytes.num_layers:
            raise ValueError(f"layer {layer} of {self._bytes.num_layers} is ready already, or there is none")
        transfer.layers.add(layer)
        self._order(lambda: self._send_layer(transfer, layer))

    def abort(self, transfer: Transfer) -> Future[None]:
        """Stops sending; also after a failure, before the blocks are freed.

        Returns:
            Done when no write that is under way reads the transfer's blocks: they may be reused. It waits for
            as long as a stopped target leaves a write unfinished (NIXL cannot cancel one). TransferError when
            the sender ends first.
        """
        quiet: Future[None] = Future()
        quiet.set_running_or_notify_cancel()
        if not self._order(lambda: self._abort(transfer, quiet)):
            quiet.set_exception(_closed())
        return quiet

    def close(self) -> None:
        """Aborts what is going on, and ends the thread and the connections."""
        self._closing = True
        self._wake.set()
        self._thread.join(2 * _CLOSE_TIMEOUT_S)

    def _order(self, work: Callable[[], None]) -> bool:
        """Leaves an order for the thread; False when that has taken its last one."""
        with self._orders_lock:
            if self._orders_closed:
                return False
            self._orders.append(work)
        self._wake.set()
        return True

    # The thread.

    def _run(self) -> None:
        try:
            pause = _SHORTEST_PAUSE_S
            while not self._closing:
                busy = self._step()
                pause = _SHORTEST_PAUSE_S if busy else min(pause * 1.5, self._longest_pause())
                if self._wake.wait(pause):
                    self._wake.clear()
        except Exception:
            logger.exception("the KV sender ended")
            self._end(TransferError("INTERNAL", "the KV sender ended"))
            raise
        self._end(_closed())

    def _step(self) -> int:
        now = time.monotonic()
        done = 0
        while self._orders:
            self._orders.popleft()()
            done += 1
        self._check_fence()
        for route in list(self._routes.values()):
            done += route.step(now, self._count_bytes)
            if route.broken is not None:
                self._end_route(route, route.broken)
        self._transfers = [transfer for transfer in self._transfers if transfer.live]
        self._report_quiet()
        return done

    def _check_fence(self) -> None:
        if self._transfers and not self._may_send():
            for transfer in self._transfers:
                transfer.fail(TransferError("FENCED", "this rank's lease does not hold: nothing leaves it"))

    def _longest_pause(self) -> float:
        routes = self._routes.values()
        if any(route.polled for route in routes):
            return _LONGEST_PAUSE_S
        return _WAITING_PAUSE_S if any(route.waiting for route in routes) else _IDLE_PAUSE_S

    def _begin(self, transfer: Transfer) -> None:
        if not transfer.live:
            return
        self._transfers.append(transfer)
        for address in {transfer.shard(part).transfer_address for part in transfer.parts}:
            if address not in self._routes:
                self._routes[address] = self._make_route(address)

    def _make_route(self, address: str) -> Route:
        def make_outbox(link: Link, ring: OpenRingResponse) -> Outbox:
            return Outbox(
                self._bytes,
                self._introduction.source_incarnation,
                address,
                link,
                ring,
                self._sequences[ring.target_incarnation],
                self._ack_timeout_s,
            )

        return Route(
            address,
            self._introduction,
            self._nixl,
            self._demand_nixl,
            self._open_timeout_s,
            self._wake.set,
            make_outbox,
            time.monotonic(),
        )

    def _send_layer(self, transfer: Transfer, layer: int) -> None:
        for part in transfer.parts:
            route = self._routes.get(transfer.shard(part).transfer_address)
            # Without a route the transfer has failed with it; its last layers only come a little later.
            if transfer.live and route is not None:
                route.add(Share(transfer, part, layer), time.monotonic())

    def _end_route(self, route: Route, error: TransferError) -> None:
        for transfer in self._transfers:
            if any(transfer.shard(part).transfer_address == route.address for part in transfer.parts):
                transfer.fail(error)
        if route.try_close():
            del self._routes[route.address]

    def _abort(self, transfer: Transfer, quiet: Future[None]) -> None:
        transfer.fail(TransferError("ABORTED", f"attempt {transfer.attempt.request_id} was given up"))
        self._quieting.append((transfer, quiet))

    def _report_quiet(self) -> None:
        if not self._quieting:
            return
        still = []
        for transfer, quiet in self._quieting:
            if any(route.reads(transfer) for route in self._routes.values()):
                still.append((transfer, quiet))
            else:
                quiet.set_result(None)
        self._quieting = still

    def _count_bytes(self, num_bytes: int) -> None:
        self.bytes_posted += num_bytes

    def _end(self, error: TransferError) -> None:
        """Nobody waits in vain: what has begun fails, and every abort gets its answer."""
        with self._orders_lock:
            self._orders_closed = True
        while self._orders:
            self._orders.popleft()()
        for transfer in self._transfers:
            transfer.fail(error)
        self._close_routes()
        self._report_quiet()
        for _, quiet in self._quieting:
            quiet.set_exception(error)

    def _close_routes(self) -> None:
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        while self._routes and time.monotonic() < deadline:
            self._routes = {
                address: route for address, route in self._routes.items() if not route.try_close()
            }
            time.sleep(_SHORTEST_PAUSE_S)
        for address in self._routes:
            logger.warning("a write to %s is still under way; its target is stopped or cut off", address)


def _make_nixl(transport: TransportChoice, incarnation: str, arena: KvArena) -> NixlLinks | None:
    if transport == "grpc":
        return None
    try:
        return NixlSource(incarnation, arena)
    except NixlUnavailableError as error:
        if transport == "nixl":
            raise
        logger.warning("KV leaves by gRPC alone: %s", error)
        return None


def _closed() -> TransferError:
    return TransferError("ABORTED", "the KV sender is closed")
