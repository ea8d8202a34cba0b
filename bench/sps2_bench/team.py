"""The processes of one measured engine: kept alive for a whole run, the cores dealt evenly among them.

Knows nothing of what they measure: a message goes to all ranks, and one answer comes from each.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from types import TracebackType
from typing import Self

import torch

from sps2_bench.processes import Message, Worker
from sps2_engine.collectives import (
    Communicator,
    SoloCommunicator,
    TorchCommunicator,
    connect_store,
    form_groups,
    open_store,
)

HOST = "127.0.0.1"
CPU = torch.device("cpu")
GROUP_TIMEOUT = timedelta(hours=1)
"""A rank waits this long for a peer: a long prompt on a slow core takes minutes."""


class Team:
    """Ranks of one engine; each runs the same module and joins the others with `join_team`."""

    def __init__(self, module: str, settings: Message, ranks: int, cpus: Sequence[int]) -> None:
        """Starts them; each gets the settings with its "rank", the "size" and the "store" to meet at.

        Raises:
            ValueError: there are more ranks than cores.
        """
        self.threads = len(cpus) // ranks
        if not self.threads:
            raise ValueError(f"{ranks} ranks want {ranks} cores, and there are {len(cpus)}")
        settings = {**settings, "size": ranks}
        if ranks > 1:
            self._store, settings["store"] = open_store(HOST, GROUP_TIMEOUT)
        with ExitStack() as stack:
            self._workers = []
            for rank in range(ranks):
                share = cpus[rank * self.threads : (rank + 1) * self.threads]
                self._workers.append(stack.enter_context(Worker(module, {**settings, "rank": rank}, share)))
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def run(self, message: Message) -> list[Message]:
        """Asks every rank the same at the same time; the answers by rank.

        Raises:
            WorkerError: a rank ended or fell silent.
        """
        for worker in self._workers:
            worker.ask(message)
        return [worker.answer(GROUP_TIMEOUT.total_seconds()) for worker in self._workers]


def join_team(settings: Message) -> Communicator:
    """A rank's side: its place in the group of the team."""
    if settings["size"] == 1:
        return SoloCommunicator()
    store = connect_store(settings["store"], GROUP_TIMEOUT)
    lanes = form_groups(store, 1, settings["rank"], settings["size"], CPU, HOST, GROUP_TIMEOUT)
    return TorchCommunicator(lanes, CPU)
