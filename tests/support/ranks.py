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

from sps2_engine.collectives import Communicator, TorchCommunicator, form_groups
from sps2_engine.mesh import Mesh
from sps2_engine.rank_groups import RankGroups, form_rank_groups

Result = TypeVar("Result")

TIMEOUT = timedelta(seconds=30)


def run_ranks(num_ranks: int, work: Callable[[Communicator], Result]) -> list[Result]:
    """Calls `work` once on each rank with its communicator and returns the results by rank."""
    return run_mesh(Mesh(num_ranks, 1), lambda groups: work(groups.everyone))


def run_mesh(mesh: Mesh, work: Callable[[RankGroups], Result]) -> list[Result]:
    """Calls `work` once on each rank of a mesh with its groups and returns the results by rank."""
    if mesh.size == 1:
        return [work(RankGroups.solo())]
    store = dist.HashStore()  # type: ignore[attr-defined,unused-ignore] # the stubs do not export it
    formed = Barrier(mesh.size, timeout=TIMEOUT.total_seconds())

    def on_rank(rank: int) -> Result:
        device, posted = torch.device("cpu"), Counter[str]()

        def form(own: Store, rank: int, size: int) -> TorchCommunicator:
            lanes = form_groups(own, 1, rank, size, device, "127.0.0.1", TIMEOUT)
            return TorchCommunicator(lanes, device, posted)

        groups = form_rank_groups(mesh, rank, store, form)
        formed.wait()  # a rank with nothing to exchange may not leave while others still connect to it
        try:
            return work(groups)
        finally:
            groups.close()

    with ThreadPoolExecutor(mesh.size) as pool:
        return list(pool.map(on_rank, range(mesh.size)))
