"""Runs a function on several ranks, as threads of one process over real Gloo process groups.

Threads are enough for what collectives and schedules compute; tests of death and isolation use processes.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Barrier
from typing import TypeVar

import torch
import torch.distributed as dist

from sps2_engine.collectives import Communicator, SoloCommunicator, TorchCommunicator, form_groups

Result = TypeVar("Result")

TIMEOUT = timedelta(seconds=30)


def run_ranks(num_ranks: int, work: Callable[[Communicator], Result]) -> list[Result]:
    """Calls `work` once on each rank with its communicator and returns the results by rank."""
    if num_ranks == 1:
        return [work(SoloCommunicator())]
    store = dist.HashStore()  # type: ignore[attr-defined,unused-ignore] # the stubs do not export it
    formed = Barrier(num_ranks, timeout=TIMEOUT.total_seconds())

    def on_rank(rank: int) -> Result:
        device = torch.device("cpu")
        lanes = form_groups(store, 1, rank, num_ranks, device, "127.0.0.1", TIMEOUT)
        formed.wait()  # a rank with nothing to exchange may not leave while others still connect to it
        communicator = TorchCommunicator(lanes, device)
        try:
            return work(communicator)
        finally:
            communicator.close()

    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(on_rank, range(num_ranks)))
