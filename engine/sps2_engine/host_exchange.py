"""Exchanges between ranks of one host through memory that they share, for what a decode step exchanges.

A collective of Gloo goes through sockets and wakes threads, 0.3 ms between two ranks where the bytes take microseconds.
Here the rank itself moves them while it waits, so nothing moves while it computes: prefill, whose exchanges are large
and hidden behind compute, keeps Gloo. Moves bytes; knows nothing of what they are.
"""

import ctypes
import logging
import mmap
import os
import secrets
import select
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sps2_engine.collectives import AWAKE_S, GroupError, PendingExchange, TorchCommunicator
from sps2_kernels.native_build import load_native

_log = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "native" / "shared_rings.c"
CAPACITY = 1 << 18
"""Bytes from a rank to another that lie between them at most; what is larger flows through."""
LINE = 64
AWAKE_NS = int(AWAKE_S * 1e9)
ASLEEP_NS = 20_000_000
"""How long a rank sleeps before it looks whether its peers are alive."""
KIND = "control"


class _Rings(ctypes.Structure):
    """`Rings` of the C source."""

    _fields_ = (
        ("memory", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("capacity", ctypes.c_int64),
    )


class _Part(ctypes.Structure):
    """`Part` of the C source."""

    _fields_ = (
        ("send", ctypes.c_void_p),
        ("receive", ctypes.c_void_p),
        ("to_send", ctypes.c_int64),
        ("to_receive", ctypes.c_int64),
    )


@cache
def _native() -> ctypes.CDLL | None:
    library = load_native(SOURCE)
    if library is not None:
        pointer = ctypes.c_void_p
        library.rings_advance.argtypes = [pointer, pointer]
        library.rings_wait.argtypes = [pointer, pointer, ctypes.c_int64, ctypes.c_int64]
        library.rings_leave.argtypes = [pointer]
        library.rings_leave.restype = None
    return library


def within_host(group: TorchCommunicator, timeout_s: float) -> "TorchCommunicator | HostCommunicator":
    """The same ranks over shared memory where all of them can share some, or else the group itself.

    All ranks of the group call it together, and get the same.

    Args:
        group: over Gloo.
        timeout_s: longest wait for a peer that is alive.

    Raises:
        GroupError: a rank died meanwhile.
    """
    library = _native()
    with ExitStack() as opened:
        shared = _share(group, opened, able=library is not None)
        everyone_has = torch.tensor([float(shared is not None)])
        group.all_reduce(everyone_has, KIND)
        if everyone_has.item() < group.size or shared is None or library is None:
            return group
        memory, peers = shared
        _log.info("rank %d of %d exchanges through shared memory", group.rank, group.size)
        return HostCommunicator(group, library, memory, peers, timeout_s, opened.pop_all())


def _share(
    group: TorchCommunicator, opened: ExitStack, *, able: bool
) -> "tuple[mmap.mmap, list[int]] | None":
    """Rank 0's memory, and of each peer a descriptor that says when it has died; None where that cannot be had.

    The memory has no name in a file system, so nothing can be left behind. A process number leads to the same process
    only within one namespace; that it does is proved by what lies in that process' memory. A rank that is not able
    takes part all the same.
    """
    size = group.size * LINE + group.size**2 * (2 * LINE + CAPACITY)
    token = secrets.token_bytes(LINE)
    own = os.memfd_create("sps2-exchange")
    opened.callback(os.close, own)
    os.truncate(own, size + LINE)  # takes memory page by page, as it is used
    os.pwrite(own, token, size)
    cards = _all_gather(group, token + os.getpid().to_bytes(8, "little") + own.to_bytes(8, "little"))
    memories, peers = [], []
    if not able:
        return None
    try:
        for rank, card in enumerate(cards):
            pid, there = (int.from_bytes(card[at : at + 8], "little") for at in (LINE, LINE + 8))
            memories.append(os.open(f"/proc/{pid}/fd/{there}", os.O_RDWR | os.O_CLOEXEC))
            opened.callback(os.close, memories[-1])
            if os.pread(memories[-1], LINE, size) != card[:LINE]:
                return None
            if rank != group.rank:
                peers.append(os.pidfd_open(pid))
                opened.callback(os.close, peers[-1])
        return mmap.mmap(memories[0], size), peers
    except OSError:
        return None


def _all_gather(group: TorchCommunicator, card: bytes) -> list[bytes]:
    """The cards of all ranks, of one length."""
    others = [len(card) if peer != group.rank else 0 for peer in range(group.size)]
    send = torch.frombuffer(bytearray(card * (group.size - 1)), dtype=torch.uint8)
    received = bytes(group.all_to_all(send, others, others, KIND).wait().tolist())
    parts = [received[begin : begin + len(card)] for begin in range(0, len(received), len(card))]
    return [*parts[: group.rank], card, *parts[group.rank :]]


@dataclass(eq=False)
class _HostExchange:
    """A posted exchange; its buffers live as long as it."""

    group: "HostCommunicator"
    parts: "ctypes.Array[_Part]"
    send: Tensor
    received: Tensor
    complete: bool = False
    call: Callable[[float], None] | None = None

    def wait(self) -> Tensor:
        """See `PendingExchange.wait`."""
        self.group.finish(self)
        return self.received

    def when_complete(self, call: Callable[[float], None]) -> None:
        """See `PendingExchange.when_complete`: somebody has to wait for it."""
        if self.complete:
            call(time.perf_counter())
        self.call = call


class HostCommunicator:
    """A group of ranks of one host: exchanges and sums by shared memory, agreements as the group over Gloo has them.

    Exchanges complete in the order of their posts, whatever their lanes.
    """

    def __init__(
        self,
        group: TorchCommunicator,
        library: ctypes.CDLL,
        memory: mmap.mmap,
        peers: Sequence[int],
        timeout_s: float,
        opened: ExitStack,
    ) -> None:
        """Takes over what `within_host` has opened; `peers` are process descriptors."""
        self.rank, self.size, self.bytes_posted = group.rank, group.size, group.bytes_posted
        self._group = group
        self._library = library
        self._timeout_s = timeout_s
        self._opened = opened
        self._deaths = select.poll()
        for peer in peers:
            self._deaths.register(peer, select.POLLIN)
        self._start = ctypes.c_char.from_buffer(memory)  # holds the memory
        self._rings = _Rings(ctypes.addressof(self._start), self.rank, self.size, CAPACITY)
        self._at = ctypes.addressof(self._rings)
        self._pending: deque[_HostExchange] = deque()
        self._open = True

    def all_to_all(
        self,
        send: Tensor,
        send_bytes: Sequence[int],
        recv_bytes: Sequence[int],
        kind: str,
        lane: int = 0,
        into: Tensor | None = None,
    ) -> PendingExchange:
        """See `Communicator.all_to_all`."""
        received = torch.empty(sum(recv_bytes), dtype=torch.uint8) if into is None else into
        self.bytes_posted[kind] += sum(send_bytes)
        return self._post(send, send_bytes, received, recv_bytes)

    def all_reduce(self, tensor: Tensor, kind: str) -> None:
        """See `SummingCommunicator.all_reduce`: each rank adds up a part, in the order of ranks, and passes it on."""
        flat = tensor.view(-1)
        if self.size == 2:  # a + b is b + a, so both may add up all of it
            (other,) = self._swap(flat, [len(flat)] * 2, [len(flat)] * 2)
            flat.add_(other)
        else:
            self._reduce_parts(flat.tensor_split(self.size))
        self.bytes_posted[kind] += 2 * tensor.nbytes * (self.size - 1) // self.size

    def agree(self, value: int) -> int:
        """See `Communicator.agree`."""
        return self._group.agree(value)

    def close(self) -> None:
        """See `Communicator.close`; the memory is free with the last reference to this."""
        if self._open:
            self._open = False
            self._library.rings_leave(self._at)
            self._opened.close()
        self._group.close()

    def finish(self, exchange: _HostExchange) -> None:
        """Waits until an exchange that was posted here is complete, and those before it.

        Raises:
            GroupError: a peer died or left, or the group's timeout passed.
        """
        while not exchange.complete:
            self._check_open()
            self._wait(self._pending[0])
            self._take_complete()

    def _reduce_parts(self, parts: Sequence[Tensor]) -> None:
        own, sizes = parts[self.rank], [len(part) for part in parts]
        mine = [len(own)] * self.size
        others = [peer for peer in range(self.size) if peer != self.rank]
        summands = self._swap(torch.cat([parts[peer] for peer in others]), sizes, mine)
        summands.insert(self.rank, own)
        own.copy_(torch.stack(summands).sum(0))
        for peer, part in zip(others, self._swap(own.repeat(len(others)), mine, sizes), strict=True):
            parts[peer].copy_(part)

    def _swap(self, send: Tensor, sent: Sequence[int], received: Sequence[int]) -> list[Tensor]:
        """Elements of flat tensors to and from each rank, with what this rank would send itself; from each peer."""
        to_peers, from_peers = (
            [0 if peer == self.rank else count * send.itemsize for peer, count in enumerate(counts)]
            for counts in (sent, received)
        )
        into = send.new_empty(sum(from_peers) // send.itemsize)
        whole = self._post(send, to_peers, into, from_peers).wait()
        counts = [count // send.itemsize for peer, count in enumerate(from_peers) if peer != self.rank]
        return list(torch.split(whole, counts))

    def _post(
        self, send: Tensor, send_bytes: Sequence[int], received: Tensor, recv_bytes: Sequence[int]
    ) -> _HostExchange:
        parts = (_Part * self.size)()
        source, target = send.data_ptr(), received.data_ptr()
        for part, num_sent, num_received in zip(parts, send_bytes, recv_bytes, strict=True):
            part.send, part.receive, part.to_send, part.to_receive = source, target, num_sent, num_received
            source, target = source + num_sent, target + num_received
        exchange = _HostExchange(self, parts, send, received)
        self._pending.append(exchange)
        self._take_complete()
        return exchange

    def _check_open(self) -> None:
        if not self._open:
            raise GroupError("this rank has left the group")

    def _take_complete(self) -> None:
        """Moves on as far as takes no waiting, one exchange after the other: so their bytes lie in the rings."""
        self._check_open()
        while self._pending and self._library.rings_advance(self._at, self._pending[0].parts):
            done = self._pending.popleft()
            done.complete = True
            if done.call is not None:
                done.call(time.perf_counter())

    def _wait(self, exchange: _HostExchange) -> None:
        """Returns when the exchange that is first is complete."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            has_died = bool(self._deaths.poll(0))
            moved = self._library.rings_wait(self._at, exchange.parts, AWAKE_NS, ASLEEP_NS)
            if moved > 0:
                return
            if moved < 0 or has_died:  # what it had sent before has come
                raise GroupError("exchange failed: a rank has left the group or died")
            if time.monotonic() > deadline:
                raise GroupError(f"exchange failed: nothing came for {self._timeout_s:g} s")
