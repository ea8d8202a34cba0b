"""Runs a function on several ranks, as threads of one process over real Gloo process groups.

Threads are enough for what collectives and schedules compute; tests of death and isolation use processes.
"""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Barrier
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from sps2_engine.collectives import Communicator, SummingCommunicator, TorchCommunicator, form_groups
from sps2_engine.host_exchange import within_host
from sps2_engine.mesh import Mesh
from sps2_engine.rank_groups import RankGroups, form_rank_groups

Result = TypeVar("Result")

TIMEOUT = timedelta(seconds=30)


def run_ranks(
    num_ranks: int, work: Callable[[Communicator], Result], *, by_memory: bool = False
) -> list[Result]:
    """Calls `work` once on each rank with its communicator and returns the results by rank."""
    return run_mesh(Mesh(num_ranks, 1), lambda groups: work(groups.everyone), by_memory=by_memory)


def run_mesh(mesh: Mesh, work: Callable[[RankGroups], Result], *, by_memory: bool = False) -> list[Result]:
    """Calls `work` once on each rank of a mesh with its groups and returns the results by rank.

    Args:
        mesh: of the ranks.
        work: what each does.
        by_memory: whether they exchange through shared memory, as decode ranks do.
    """
    if mesh.size == 1:
        return [work(RankGroups.solo())]
    store = dist.HashStore()  # type: ignore[attr-defined,unused-ignore] # the stubs do not export it
    formed = Barrier(mesh.size, timeout=TIMEOUT.total_seconds())

    def on_rank(rank: int) -> Result:
        device, posted = torch.device("cpu"), Counter[str]()

        def form(own: Store, rank: int, size: int) -> SummingCommunicator:
            lanes = form_groups(own, 1, rank, size, device, "127.0.0.1", TIMEOUT)
            group = TorchCommunicator(lanes, device, posted)
            return within_host(group, TIMEOUT.total_seconds()) if by_memory else group

        groups = form_rank_groups(mesh, rank, store, form)
        formed.wait()  # a rank with nothing to exchange may not leave while others still connect to it
        try:
            return work(groups)
        finally:
            groups.close()

    with ThreadPoolExecutor(mesh.size) as pool:
        return list(pool.map(on_rank, range(mesh.size)))
