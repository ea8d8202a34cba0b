"""Packed exchanges between the ranks of a group, with counters of what was really posted.

A communicator hides the backend (Gloo on CPUs, NCCL on GPUs) and owns its process group, which is an argument and
never a global. It knows nothing of attention: callers say how many bytes go to and come from each rank.
"""

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store

MEET_POLL_S = 0.005


CONNECT_TIMEOUT = timedelta(seconds=5)
"""For ranks that are all there to connect to each other; it takes milliseconds."""
AWAKE_S = 0.001
"""How long a rank looks again and again whether an exchange on CPUs is complete, before it sleeps."""
LANES = 2
"""What goes in and what goes out of a layer's attention overlap, so neither may queue behind the other."""


class GroupError(RuntimeError):
    """A collective failed or timed out: the process group is dead and a new epoch is needed."""


class PendingExchange(Protocol):
    """A posted exchange."""

    def wait(self) -> Tensor:
        """Blocks until the exchange is complete and returns the received bytes, by source rank in order.

        Raises:
            GroupError: a peer died or the group's timeout passed.
        """
        ...

    def when_complete(self, call: Callable[[float], None]) -> None:
        """Calls back with the time (`time.perf_counter`) of completion, on any thread; for measurements.

        Where a device carries exchanges out on its own, that is when the host has queued it.
        """
        ...


class Communicator(Protocol):
    """What attention needs of a group of ranks; implemented over torch.distributed and by one rank alone."""

    rank: int
    size: int
    bytes_posted: Counter[str]

    def all_to_all(
        self,
        send: Tensor,
        send_bytes: Sequence[int],
        recv_bytes: Sequence[int],
        kind: str,
        lane: int = 0,
        into: Tensor | None = None,
    ) -> PendingExchange:
        """Posts one uneven all-to-all and returns at once.

        Args:
            send: uint8 [sum(send_bytes)], the parts for rank 0, 1, ... one after another; must stay untouched
                until the exchange is complete.
            send_bytes: bytes for each rank; 0 for this rank (what stays here is not exchanged).
            recv_bytes: bytes from each rank.
            kind: name of the counter that the posted bytes are added to.
            lane: exchanges of one lane complete in the order of their posts; those of another need not wait for
                them. At most `LANES`.
            into: uint8 [sum(recv_bytes)], what is received goes there; without it, into a new tensor.
        """
        ...

    def agree(self, value: int) -> int:
        """Rank 0's value, on every rank (one small broadcast, counted as "control"); waits for no exchange.

        Args:
            value: 64 bits with sign; those of the other ranks do not matter.

        Raises:
            GroupError: as in `PendingExchange.wait`.
        """
        ...

    def close(self) -> None:
        """Leaves the group; peers that wait for this rank fail at once."""
        ...


class SummingCommunicator(Communicator, Protocol):
    """What parallel layers need of a group besides."""

    def all_reduce(self, tensor: Tensor, kind: str) -> None:
        """Sums a tensor of the same shape over all ranks, in place; every rank gets the same bits.

        Args:
            tensor: contiguous, in a dtype that is fit to be summed in.
            kind: name of the counter; a rank posts 2 (n - 1) / n of the tensor, as in a ring.

        Raises:
            GroupError: as in `PendingExchange.wait`.
        """
        ...


class SoloCommunicator:
    """A group of one rank: nothing to exchange."""

    rank = 0
    size = 1

    def __init__(self, bytes_posted: Counter[str] | None = None) -> None:
        self.bytes_posted = bytes_posted if bytes_posted is not None else Counter()

    def all_to_all(
        self,
        send: Tensor,
        send_bytes: Sequence[int],
        recv_bytes: Sequence[int],
        kind: str,
        lane: int = 0,
        into: Tensor | None = None,
    ) -> PendingExchange:
        """A rank alone has no peer; a caller that exchanges has made a wrong plan."""
        raise ValueError("a group of one rank has nobody to exchange with")

    def agree(self, value: int) -> int:
        """The value itself."""
        return value

    def close(self) -> None:
        """Nothing to leave."""


class LeadingRanks:
    """The first ranks of a group, as if they were all of it: the others exchange nothing, but stay in step.

    Every rank of the group makes one; those beyond the first `size` post the same exchanges with zero bytes.
    """

    def __init__(self, group: Communicator, size: int) -> None:
        self._group = group
        self.rank = group.rank
        self.size = size
        self.bytes_posted = group.bytes_posted

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
        idle = [0] * (self._group.size - self.size)
        return self._group.all_to_all(send, [*send_bytes, *idle], [*recv_bytes, *idle], kind, lane, into)

    def agree(self, value: int) -> int:
        """See `Communicator.agree`: the whole group does."""
        return self._group.agree(value)

    def close(self) -> None:
        """See `Communicator.close`."""
        self._group.close()


@dataclass(frozen=True)
class _TorchExchange:
    """A posted torch.distributed exchange; holds the send buffer so that it outlives the transfer."""

    work: dist.Work
    send: Tensor
    received: Tensor

    def wait(self) -> Tensor:
        try:
            _wait(self.work, self.received)
        except RuntimeError as error:
            raise GroupError(f"exchange failed: {error}") from error
        return self.received

    def when_complete(self, call: Callable[[float], None]) -> None:
        # torch's stubs do not know that the futures of process groups take callbacks.
        future: Any = self.work.get_future()
        future.add_done_callback(lambda _: call(time.perf_counter()))


class TorchCommunicator:
    """A group over torch.distributed process groups of the same ranks, none of them the default one.

    Args:
        groups: as `form_groups` makes them: one for all lanes, or one for each where the backend completes its
            exchanges one by one; and a last one in which the ranks agree, whatever travels on the lanes.
        device: where the tensors lie.
        bytes_posted: counters to add to.
    """

    def __init__(
        self,
        groups: Sequence[dist.ProcessGroup],
        device: torch.device,
        bytes_posted: Counter[str] | None = None,
    ) -> None:
        self._groups = tuple(groups)
        self._device = device
        self.rank = groups[0].rank()
        self.size = groups[0].size()
        self.bytes_posted = bytes_posted if bytes_posted is not None else Counter()
        self._agreed = torch.zeros(1, dtype=torch.int64, device=device)

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
        received = (
            torch.empty(sum(recv_bytes), dtype=torch.uint8, device=self._device) if into is None else into
        )
        try:
            work = self._lane(lane).alltoall_base(received, send, list(recv_bytes), list(send_bytes))
        except RuntimeError as error:
            raise GroupError(f"exchange could not be posted: {error}") from error
        self.bytes_posted[kind] += sum(send_bytes)
        return _TorchExchange(work, send, received)

    def all_reduce(self, tensor: Tensor, kind: str) -> None:
        """See `SummingCommunicator.all_reduce`: both backends add up each element on one rank and pass it on."""
        try:
            _wait(self._lane(0).allreduce([tensor]), tensor)
        except RuntimeError as error:
            raise GroupError(f"sum failed: {error}") from error
        self.bytes_posted[kind] += 2 * tensor.nbytes * (self.size - 1) // self.size

    def agree(self, value: int) -> int:
        """See `Communicator.agree`."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._agreed.fill_(value)
        try:
            self._open_groups[-1].broadcast([self._agreed], options).wait()
        except RuntimeError as error:
            raise GroupError(f"agreement failed: {error}") from error
        if self.rank == 0:
            self.bytes_posted["control"] += self._agreed.nbytes * (self.size - 1)
        return int(self._agreed.item())

    def close(self) -> None:
        """See `Communicator.close`; the connections of a process group end with its last reference."""
        self._groups = ()

    @property
    def _open_groups(self) -> tuple[dist.ProcessGroup, ...]:
        if not self._groups:
            raise GroupError("this rank has left the group")
        return self._groups

    def _lane(self, lane: int) -> dist.ProcessGroup:
        lanes = self._open_groups[:-1]
        return lanes[lane % len(lanes)]


def _wait(work: dist.Work, result: Tensor) -> None:
    """Waits for work of this rank's host, after a while asleep.

    The exchanges of a decode step take tens of microseconds, and to wake a thread takes longer than that.
    """
    if result.device.type == "cpu":
        asleep_at = time.perf_counter() + AWAKE_S
        while not work.is_completed() and time.perf_counter() < asleep_at:
            time.sleep(0)  # other threads of this process get the interpreter,
            os.sched_yield()  # and other processes the core
    work.wait()


def open_store(host: str, timeout: timedelta) -> tuple[TCPStore, str]:
    """Starts a rendezvous store that listens on `host` alone, on a port the kernel picks.

    Returns:
        The store and its "host:port".
    """
    listener = socket.create_server((host, 0))
    address = f"{host}:{listener.getsockname()[1]}"
    # The store takes the descriptor over and closes it; given a plain port it would listen on all interfaces.
    store = TCPStore(
        host,
        listener.getsockname()[1],
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, address


def connect_store(address: str, timeout: timedelta) -> TCPStore:
    """Connects to a store that another rank started.

    Raises:
        GroupError: it cannot be reached within about `timeout`.
    """
    host, _, port = address.rpartition(":")
    try:
        # The store listens before anybody hears of it: one that refuses is gone. TCPStore's constructor cannot be
        # called off, and tries twice, each time for as long as it is given, with a pause of seconds between.
        socket.create_connection((host, int(port)), timeout.total_seconds()).close()
        store = TCPStore(host, int(port), is_master=False, timeout=timeout / 4, wait_for_workers=False)
        store.set_timeout(timeout)
    except (OSError, RuntimeError, ValueError) as error:
        raise GroupError(f"rendezvous store {address} cannot be reached: {error}") from error
    return store


def meet(
    store: Store, epoch: int, rank: int, size: int, timeout: timedelta, given_up: Callable[[], bool]
) -> None:
    """Waits until every rank has come to the store, so that forming the group takes milliseconds after it.

    Forming itself cannot be called off; this can, when a rank dies before it has come.

    Raises:
        GroupError: not all came within `timeout`, `given_up` says so, or the store is gone.
    """
    prefixed = PrefixStore(f"meet-{epoch}", store)
    deadline = time.monotonic() + timeout.total_seconds()
    while not _all_are_there(prefixed, rank, size):
        if given_up():
            raise GroupError(f"epoch {epoch} ended before all ranks had come")
        if time.monotonic() > deadline:
            raise GroupError(f"not all {size} ranks came within {timeout.total_seconds():g} s")
        time.sleep(MEET_POLL_S)


def _all_are_there(store: Store, rank: int, size: int) -> bool:
    try:
        store.set(str(rank), "here")
        return bool(store.check([str(one) for one in range(size)]))
    except RuntimeError as error:
        raise GroupError(f"the rendezvous store is gone: {error}") from error


def form_groups(
    store: Store, epoch: int, rank: int, size: int, device: torch.device, host: str, timeout: timedelta
) -> list[dist.ProcessGroup]:
    """Forms the process groups of one epoch: Gloo bound to `host`, or on a GPU one of NCCL for each lane.

    A communicator of NCCL completes its collectives one by one; Gloo works on two at once. So the last group is
    for agreements alone: in another they would wait for the exchanges that were posted before. Every epoch has a
    store prefix of its own, so that what a dead epoch left behind is never read.

    Raises:
        GroupError: not all ranks came within `timeout`.
    """
    num_groups = (LANES if device.type == "cuda" else 1) + 1
    prefixes = [PrefixStore(f"epoch-{epoch}/{lane}", store) for lane in range(num_groups)]
    try:
        return [_make_group(prefix, rank, size, device, host, timeout) for prefix in prefixes]
    except RuntimeError as error:
        raise GroupError(f"group of epoch {epoch} could not form: {error}") from error


def _make_group(
    store: Store, rank: int, size: int, device: torch.device, host: str, timeout: timedelta
) -> dist.ProcessGroup:
    # torch's stubs know neither Gloo's options nor that a backend serves as a group of its own, and a CPU build
    # has no NCCL to import.
    on_gpu = device.type == "cuda"
    make: Any = getattr(dist, "ProcessGroupNCCL" if on_gpu else "ProcessGroupGloo")
    options = make.Options() if on_gpu else make._Options()  # noqa: SLF001
    # Forming cannot be called off: a rank that dies in the middle of it holds the others up for this long.
    options._timeout = min(timeout, CONNECT_TIMEOUT)  # noqa: SLF001
    if on_gpu:
        # NCCL runs on streams of its own that wait for what was launched before the post; of high priority, or
        # the compute launched after it would hold the exchange up.
        options.is_high_priority_stream = True
    else:
        options._devices = [make.create_device(hostname=host)]  # noqa: SLF001
    group: Any = make(store, rank, size, options)
    group._set_default_timeout(timeout)  # noqa: SLF001
    formed: dist.ProcessGroup = group
    return formed
