"""The target's side of KV transfer, one per decode engine: its thread, its rings, its in-engine server.

The thread shares a core with decode steps, and each look costs them about 0.1 ms: while an attempt lacks KV it pauses
for a tenth of the time for which nothing has come, 0.2 to 20 ms, otherwise for up to 50 ms.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Final, TypeVar

from sps2.internal.v1.kv_transfer_service_pb2 import (
    KvFormat,
    OpenRingRequest,
    OpenRingResponse,
    SlabAck,
    SlabHeader,
)
from sps2.internal.v1.placement_pb2 import Fence
from sps2_engine.kv_pool import KvArena
from sps2_engine.kv_transfer.base import RingOptions, Rings, TransportChoice, TransportName
from sps2_engine.kv_transfer.grpc_server import serve
from sps2_engine.kv_transfer.intake import SlabIntake, tell_complete
from sps2_engine.kv_transfer.nixl import NixlUnavailableError
from sps2_engine.kv_transfer.nixl_rings import NixlRings
from sps2_engine.kv_transfer.slab import ArenaBytes

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_COMMAND_TIMEOUT_S: Final = 5.0
_SWEEP_INTERVAL_S: Final = 1.0
_SHORTEST_PAUSE_S: Final = 0.0002
_LONGEST_PAUSE_S: Final = 0.02
_PAUSE_GROWTH: Final = 1.1
"""A pause is then at most a tenth of the silence before it: so much later, at most, is a slab seen than it came."""
_IDLE_PAUSE_S: Final = 0.05


class KvReceiver:
    """Takes KV from any number of source processes into the blocks of this engine.

    Args:
        arena: Where it goes: all KV heads of the model, or a range of them.
        kv_format: Must describe the arena; sources with another format are turned away.
        process_incarnation: Life of this engine process, the first part of every fence.
        listen_host: Interface of the handshake server; its port is free and in `address`.
        ring: Staging memory.
        transport: "auto" offers NIXL when it can be imported; "nixl" demands it; "grpc" leaves it alone.

    Raises:
        ValueError: the format does not describe the arena, or a token does not fit into a slot.
        NixlUnavailableError: with "nixl" only.
    """

    def __init__(
        self,
        arena: KvArena,
        kv_format: KvFormat,
        process_incarnation: str,
        listen_host: str,
        *,
        ring: RingOptions | None = None,
        transport: TransportChoice = "auto",
    ) -> None:
        self._bytes = ArenaBytes(arena, kv_format)
        self._options = ring or RingOptions()
        if self._options.slot_bytes < self._bytes.token_bytes:
            raise ValueError(
                f"a token has {self._bytes.token_bytes} bytes, a slot {self._options.slot_bytes}"
            )
        self._incarnation = process_incarnation
        self.intake = SlabIntake(self._bytes, process_incarnation)
        self.rings = _make_rings(transport, process_incarnation, self._options)
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._wake = threading.Event()
        self._closing = False
        self._server, port = serve(self, kv_format, listen_host, self._options.max_rings)
        self.address = f"[{listen_host}]:{port}" if ":" in listen_host else f"{listen_host}:{port}"
        self._thread = threading.Thread(target=self._run, name="kv-receiver", daemon=True)
        self._thread.start()
        logger.info("KV is taken at %s by %s", self.address, self.transport)

    @property
    def transport(self) -> TransportName:
        """What sources that can do both will use."""
        return "grpc" if self.rings is None else "nixl"

    def expect(
        self,
        fence: Fence,
        token_begin: int,
        token_end: int,
        blocks: Sequence[int],
        on_complete: Callable[[], None],
    ) -> None:
        """Takes the KV of tokens [token_begin, token_end) of that attempt, from now on; returns at once.

        It comes from any number of sources, in slabs of any of the arena's heads.

        Args:
            fence: What slabs must carry.
            token_begin: First token of this rank's part of the prompt; lies in the first slot of `blocks[0]`.
            token_end: One past the last.
            blocks: Blocks in token order.
            on_complete: Called once, from a thread of the receiver, when every (layer, token, head) is
                verified and in its block; must return soon. For an empty range it is called at once.

        Raises:
            ValueError: the attempt is expected already, the fence is of another process, or the blocks are
                too few.
        """
        if token_begin == token_end:
            self._commands.put(lambda: tell_complete(on_complete, fence))
        else:
            self.intake.expect(fence, token_begin, token_end, blocks, on_complete)
        self._wake.set()

    def forget(self, fence: Fence) -> None:
        """After it returns no byte goes into the blocks of that attempt; unknown fences are ignored."""
        self.intake.forget(fence)

    def close(self) -> None:
        """Ends the server, the thread and the rings; sources see their connections end."""
        self._server.stop(grace=0).wait(_COMMAND_TIMEOUT_S)
        self._closing = True
        self._wake.set()
        self._thread.join(_COMMAND_TIMEOUT_S)

    # What the server asks, from its threads.

    def open_ring(self, request: OpenRingRequest) -> OpenRingResponse:
        """See `Desk`."""
        rings = self.rings
        if rings is None or not request.agent_metadata:
            return OpenRingResponse(
                target_incarnation=self._incarnation,
                slot_bytes=self._options.slot_bytes,
                num_slots=self._options.num_slots,
            )
        return self._on_thread(lambda: rings.open(request))

    def tie(self, source_incarnation: str) -> None:
        """See `Desk`."""
        if (rings := self.rings) is not None:
            self._on_thread(lambda: rings.tie(source_incarnation))

    def untie(self, source_incarnation: str) -> None:
        """See `Desk`."""
        if (rings := self.rings) is not None:
            self._commands.put(lambda: rings.untie(source_incarnation))

    def take(self, header: SlabHeader, source_incarnation: str, copy: Callable[[], memoryview]) -> SlabAck:
        """See `SlabIntake.take`."""
        return self.intake.take(header, source_incarnation, copy)

    def _on_thread(self, work: Callable[[], _T]) -> _T:
        """Runs it on the receiver's thread, which owns the rings; TimeoutError when that is stuck."""
        future: Future[_T] = Future()

        def command() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except Exception as error:  # noqa: BLE001 - handed to the caller, whole
                    future.set_exception(error)

        self._commands.put(command)
        self._wake.set()
        try:
            return future.result(_COMMAND_TIMEOUT_S)
        finally:
            future.cancel()

    # The thread.

    def _run(self) -> None:
        try:
            self._serve_rings()
        except Exception:
            logger.exception("the KV receiver ended")
            self._server.stop(grace=0)  # sources see their connections end
            raise

    def _serve_rings(self) -> None:
        pause = _IDLE_PAUSE_S
        next_sweep = time.monotonic() + _SWEEP_INTERVAL_S
        while not self._closing:
            busy = self._run_commands() + (self.rings.poll(self.intake.take) if self.rings else 0)
            if time.monotonic() >= next_sweep and self.rings is not None:
                self.rings.sweep()
                next_sweep = time.monotonic() + _SWEEP_INTERVAL_S
            pause = _SHORTEST_PAUSE_S if busy else self._longer(pause)
            if self._wake.wait(pause):
                self._wake.clear()
                pause = _SHORTEST_PAUSE_S
        self._run_commands()  # what was asked for before the end is done
        if self.rings is not None:
            self.rings.close()

    def _longer(self, pause: float) -> float:
        limit = _LONGEST_PAUSE_S if self.rings and self.intake.num_incomplete() else _IDLE_PAUSE_S
        return min(pause * _PAUSE_GROWTH, limit)

    def _run_commands(self) -> int:
        count = 0
        while True:
            try:
                command = self._commands.get_nowait()
            except Empty:
                return count
            command()
            count += 1


def _make_rings(transport: TransportChoice, incarnation: str, options: RingOptions) -> Rings | None:
    if transport == "grpc":
        return None
    try:
        return NixlRings(incarnation, options)
    except NixlUnavailableError as error:
        if transport == "nixl":
            raise
        logger.warning("KV is taken by gRPC alone: %s", error)
        return None
