"""Slabs by one-sided WRITE over UCX: the source's links.

The pieces of a slab leave the arena straight into one slot of the target's ring; the header travels as the
notification of that write, the answer as a notification back. Knows nothing about credits or attempts.
The target's half is `nixl_rings.py`.
"""

import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

from google.protobuf.message import DecodeError

from sps2.internal.v1.kv_transfer_service_pb2 import OpenRingResponse, SlabAck, SlabHeader
from sps2_engine.kv_pool import KvArena
from sps2_engine.kv_transfer.base import Link, LinkError, SlabBytes

logger = logging.getLogger(__name__)


class NixlUnavailableError(Exception):
    """NIXL cannot be imported or has no UCX backend."""


class NixlAgent:
    """One NIXL agent, for one thread: registered memory, known peers, notifications sorted by peer.

    Without NIXL's progress thread: measured, that thread burns half a core each when idle (two busy cores
    here) and slows transfers to a fifth, while calling `pump` every 0.2 to 1 ms reaches 2.6 GB/s and costs
    nothing when no transfer is under way.
    """

    def __init__(self, name: str) -> None:
        self._api = _load_nixl()
        # NIXL's errors have no common base but Exception, so the bindings module is the list of them.
        self.errors = _nixl_errors()
        config = self._api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        try:
            self._agent = self._api.nixl_agent(name, config)
        except self.errors as error:
            raise NixlUnavailableError(f"no NIXL agent: {error}") from error
        if "UCX" not in self._agent.backends:
            raise NixlUnavailableError("NIXL has no UCX backend here")
        self.name = name
        self._inboxes: dict[str, list[bytes]] = {}

    def register(self, address: int, num_bytes: int) -> Any:
        """Makes host memory usable for transfers; the result is for `deregister`."""
        return self._agent.register_memory([(address, num_bytes, 0, "")], "DRAM")

    def deregister(self, registration: Any) -> None:
        """Undoes `register`."""
        self._agent.deregister_memory(registration)

    def metadata(self) -> bytes:
        """What a peer needs to reach this agent's memory, as of now."""
        return bytes(self._agent.get_agent_metadata())

    def add_peer(self, metadata: bytes) -> str:
        """The peer's agent name.

        Raises:
            LinkError: the metadata is not of a reachable agent.
        """
        try:
            name = str(self._agent.add_remote_agent(metadata).decode())
        except self.errors as error:
            raise LinkError(f"NIXL cannot use the peer's metadata: {error}") from error
        self._inboxes.setdefault(name, [])
        return name

    def remove_peer(self, name: str) -> None:
        """Forgets a peer; its waiting notifications go with it."""
        self._inboxes.pop(name, None)
        try:
            self._agent.remove_remote_agent(name)
        except self.errors as error:
            logger.info("NIXL had already dropped %s: %s", name, error)

    def write(
        self,
        peer: str,
        source: Sequence[tuple[int, int]],
        target: Sequence[tuple[int, int]],
        notification: bytes,
    ) -> Any:
        """Starts one WRITE of (address, bytes) pairs onto as many at the peer; returns its handle.

        Raises:
            LinkError: the peer is gone.
        """
        local = self._agent.get_xfer_descs([(address, size, 0) for address, size in source], "DRAM")
        remote = self._agent.get_xfer_descs([(address, size, 0) for address, size in target], "DRAM")
        try:
            handle = self._agent.initialize_xfer("WRITE", local, remote, peer, notification)
            state = self._agent.transfer(handle)
        except self.errors as error:
            raise LinkError(f"NIXL cannot write to {peer}: {error}") from error
        if state == "ERR":
            raise LinkError(f"NIXL cannot write to {peer}")
        return handle

    def state(self, handle: Any) -> str:
        """How a write stands: "DONE", "PROC" or "ERR"; also makes progress."""
        try:
            return str(self._agent.check_xfer_state(handle))
        except self.errors as error:
            logger.info("a write failed: %s", error)
            return "ERR"

    def release(self, handle: Any) -> None:
        """Frees the handle of a write that is DONE or ERR; on one in PROC it would not cancel anything."""
        try:
            handle.release()
        except self.errors as error:
            logger.info("NIXL kept the handle of a failed write: %s", error)

    def notify(self, peer: str, message: bytes) -> None:
        """Sends a notification.

        Raises:
            LinkError: the peer is gone.
        """
        try:
            self._agent.send_notif(peer, message)
        except self.errors as error:
            raise LinkError(f"NIXL cannot notify {peer}: {error}") from error

    def pump(self) -> None:
        """Makes progress and sorts new notifications into the inboxes.

        Raises:
            LinkError: UCX has failed.
        """
        try:
            notifications = self._agent.get_new_notifs()
        except self.errors as error:
            raise LinkError(f"NIXL cannot make progress: {error}") from error
        for peer, messages in notifications.items():
            # What a peer sends after it was removed is for nobody.
            if peer in self._inboxes:
                self._inboxes[peer].extend(bytes(message) for message in messages)

    def take(self, peer: str) -> list[bytes]:
        """Notifications of that peer since the last call, in the order of their arrival."""
        messages, self._inboxes[peer] = self._inboxes[peer], []
        return messages


class NixlSource:
    """A source process's NIXL agent with its arena registered, and the links made with it."""

    def __init__(self, incarnation: str, arena: KvArena) -> None:
        self._agent = NixlAgent(f"kv-source-{incarnation}")
        for side in (arena.k, arena.v):
            if side.nbytes:
                self._agent.register(side.data_ptr(), side.nbytes)
        self.metadata = self._agent.metadata()

    def link(self, ring: OpenRingResponse, check_tether: Callable[[], None]) -> Link:
        """The way into that ring; `check_tether` raises LinkError when the target's process is gone."""
        return NixlLink(self._agent, ring, check_tether)


class NixlLink(Link):
    """See `Link`."""

    polled = True

    def __init__(self, agent: NixlAgent, ring: OpenRingResponse, check_tether: Callable[[], None]) -> None:
        self._agent = agent
        self._ring = ring
        self._check_tether = check_tether
        self._peer = agent.add_peer(ring.agent_metadata)
        self._writes: dict[int, Any] = {}
        self._failed = False

    def post(self, header: SlabHeader, slab: SlabBytes) -> None:
        """See `Link`."""
        position = self._ring.base_address + header.slot * self._ring.slot_bytes
        target = []
        for _, size in slab.addresses:
            target.append((position, size))
            position += size
        self._writes[header.sequence] = self._agent.write(
            self._peer, slab.addresses, target, header.SerializeToString()
        )

    def acks(self) -> list[SlabAck]:
        """See `Link`."""
        self._check_tether()
        self._agent.pump()
        self.reading()
        if self._failed:
            raise LinkError(f"a write to {self._peer} failed")
        try:
            # An empty notification only asks whether this process still lives.
            return [SlabAck.FromString(message) for message in self._agent.take(self._peer) if message]
        except DecodeError as error:
            raise LinkError(f"{self._peer} sent something that is no SlabAck") from error

    def reading(self) -> set[int]:
        """See `Link`."""
        for sequence, handle in list(self._writes.items()):
            state = self._agent.state(handle)
            if state != "PROC":
                self._failed = self._failed or state == "ERR"
                self._agent.release(handle)
                del self._writes[sequence]
        return set(self._writes)

    def close(self) -> None:
        """See `Link`."""
        self._agent.remove_peer(self._peer)


def _load_nixl() -> Any:
    raise_exceptions = logging.raiseExceptions
    try:
        api = importlib.import_module("nixl._api")
    except (ImportError, OSError) as error:
        raise NixlUnavailableError(str(error)) from error
    # Importing NIXL turns the program's logging.raiseExceptions off and logs each agent it makes at INFO.
    logging.raiseExceptions = raise_exceptions
    logging.getLogger("nixl").setLevel(logging.WARNING)
    return api


def _nixl_errors() -> tuple[type[Exception], ...]:
    bindings = importlib.import_module("nixl._bindings")
    own = [
        value for name, value in vars(bindings).items() if name.endswith("Error") and isinstance(value, type)
    ]
    return (*own, RuntimeError, ValueError)
