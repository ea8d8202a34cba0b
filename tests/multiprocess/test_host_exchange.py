"""Exchanges through shared memory: what arrives, in which order, and what becomes of those whose peer is gone."""

import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from sps2_engine.collectives import (
    Communicator,
    GroupError,
    PendingExchange,
    TorchCommunicator,
    connect_store,
    form_groups,
    open_store,
)
from sps2_engine.host_exchange import CAPACITY, HostCommunicator, within_host
from support.ranks import run_ranks

CPU = torch.device("cpu")
SIZES = (0, 1, 63, 4_096, CAPACITY - 1, CAPACITY, 2 * CAPACITY + 5)


def payload(number: int, source: int, target: int, size: int) -> torch.Tensor:
    """What one rank sends another in one exchange."""
    generator = torch.Generator().manual_seed(1_000 * number + 10 * source + target)
    return torch.randint(256, (size,), dtype=torch.uint8, generator=generator)


def sizes_of(number: int, num_ranks: int) -> list[list[int]]:
    """Bytes from each rank to each, the same on all ranks."""
    draw = random.Random(number)
    return [
        [0 if source == target else draw.choice(SIZES) for target in range(num_ranks)]
        for source in range(num_ranks)
    ]


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_every_byte_arrives_in_order_also_with_many_exchanges_under_way(num_ranks: int) -> None:
    def on_rank(group: Communicator) -> int:
        assert isinstance(group, HostCommunicator)
        rank, posted = group.rank, list[PendingExchange]()
        for number in range(12):
            sizes = sizes_of(number, num_ranks)
            parts = [payload(number, rank, peer, size) for peer, size in enumerate(sizes[rank])]
            come = [line[rank] for line in sizes]
            posted.append(group.all_to_all(torch.cat(parts), sizes[rank], come, "test", lane=number % 2))
        for number in reversed(range(12)):  # each waits for those before it
            come = [line[rank] for line in sizes_of(number, num_ranks)]
            expected = [payload(number, peer, rank, size) for peer, size in enumerate(come)]
            assert torch.equal(posted[number].wait(), torch.cat(expected))
        return group.bytes_posted["test"]

    sent = [sum(sum(sizes_of(number, num_ranks)[rank]) for number in range(12)) for rank in range(num_ranks)]
    assert run_ranks(num_ranks, on_rank, by_memory=True) == sent


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("shape", [(1,), (2, 3), (7, 1_000)])
def test_sums_are_the_same_bits_everywhere_and_are_counted_as_those_of_gloo(
    num_ranks: int, shape: tuple[int, ...]
) -> None:
    def on_rank(group: Communicator) -> tuple[torch.Tensor, int]:
        assert isinstance(group, HostCommunicator | TorchCommunicator)
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(group.rank))
        group.all_reduce(tensor, "test")
        return tensor, group.bytes_posted["test"]

    found, by_gloo = (run_ranks(num_ranks, on_rank, by_memory=by_memory) for by_memory in (True, False))
    drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(rank)) for rank in range(num_ranks)]
    for (tensor, num_bytes), (_, num_bytes_by_gloo) in zip(found, by_gloo, strict=True):
        assert torch.equal(tensor, found[0][0])
        torch.testing.assert_close(tensor, torch.stack(drawn).sum(0))
        assert num_bytes == num_bytes_by_gloo


def test_what_a_rank_sent_before_it_left_arrives_and_then_nothing() -> None:
    def on_rank(group: Communicator) -> None:
        data, counts = torch.arange(9, dtype=torch.uint8), [9 * (peer != group.rank) for peer in range(2)]
        pending = group.all_to_all(data, counts, counts, "test")
        if group.rank == 1:
            pending.wait()
            group.close()
            with pytest.raises(GroupError, match="this rank has left"):
                group.all_to_all(data, counts, counts, "test")
            return
        assert torch.equal(pending.wait(), data)
        began = time.monotonic()
        with pytest.raises(GroupError, match="left the group"):
            group.all_to_all(data, counts, counts, "test").wait()
        assert time.monotonic() - began < 5

    run_ranks(2, on_rank, by_memory=True)


def test_a_silent_peer_is_given_up_after_the_group_s_timeout() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined,unused-ignore] # the stubs do not export it

    def on_rank(rank: int) -> TorchCommunicator | HostCommunicator:
        groups = form_groups(store, 1, rank, 2, CPU, "127.0.0.1", timedelta(seconds=20))
        return within_host(TorchCommunicator(groups, CPU), 0.5)

    with ThreadPoolExecutor(2) as pool:
        ranks = list(pool.map(on_rank, range(2)))
    with pytest.raises(GroupError, match="nothing came"):
        ranks[0].all_to_all(torch.zeros(4, dtype=torch.uint8), [0, 4], [0, 4], "test").wait()
    for rank in ranks:
        rank.close()


def test_ranks_that_cannot_share_memory_all_keep_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, real = list[int](), os.pidfd_open

    def second_fails(pid: int) -> int:
        opened.append(pid)
        if len(opened) == 2:
            raise PermissionError("no such process here")
        return real(pid)

    monkeypatch.setattr(os, "pidfd_open", second_fails)
    kinds = run_ranks(3, lambda group: type(group).__name__, by_memory=True)
    assert kinds == ["TorchCommunicator"] * 3


PEER = """
import sys
from datetime import timedelta
import torch
from sps2_engine.collectives import TorchCommunicator, connect_store, form_groups
from sps2_engine.host_exchange import within_host
print("here", flush=True)
timeout = timedelta(seconds=20)
groups = form_groups(connect_store(sys.argv[1], timeout), 1, 1, 2, torch.device("cpu"), "127.0.0.1", timeout)
group = within_host(TorchCommunicator(groups, torch.device("cpu")), 20)
print(type(group).__name__, flush=True)
sys.stdin.read()  # until it is killed
"""


def test_a_killed_peer_is_noticed_at_once() -> None:
    _store, address = open_store("127.0.0.1", timedelta(seconds=20))
    command = [sys.executable, "-c", PEER, address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as peer:
        try:
            assert peer.stdout is not None
            assert peer.stdout.readline() == "here\n"
            groups = form_groups(
                connect_store(address, timedelta(seconds=20)),
                1,
                0,
                2,
                CPU,
                "127.0.0.1",
                timedelta(seconds=20),
            )
            group = within_host(TorchCommunicator(groups, CPU), 20)
            assert peer.stdout.readline() == "HostCommunicator\n"
            peer.kill()
            killed = time.monotonic()
            with pytest.raises(GroupError, match="left the group or died"):
                group.all_to_all(torch.zeros(4, dtype=torch.uint8), [0, 4], [0, 4], "test").wait()
            assert time.monotonic() - killed < 1
            group.close()
        finally:
            peer.kill()
