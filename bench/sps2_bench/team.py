"""The processes of one measured engine: kept alive for a whole run, the cores dealt evenly among them.

Knows nothing of what they measure: a message goes to all ranks, and one answer comes from each.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from types import TracebackType
from typing import Self

import torch
from torch.distributed.distributed_c10d import Store

from sps2_bench.processes import Message, Worker
from sps2_engine.collectives import (
    Communicator,
    SummingCommunicator,
    TorchCommunicator,
    connect_store,
    form_groups,
    open_store,
)
from sps2_engine.host_exchange import within_host
from sps2_engine.mesh import Mesh
from sps2_engine.rank_groups import RankGroups, form_rank_groups

HOST = "127.0.0.1"
CPU = torch.device("cpu")
GROUP_TIMEOUT = timedelta(hours=1)
"""A rank waits this long for a peer: a long prompt on a slow core takes minutes."""


class Team:
    """Ranks of one engine; each runs the same module and joins the others with `join_team`."""

    def __init__(
        self, module: str, settings: Message, ranks: int, cpus: Sequence[int], *, share_cores: bool = False
    ) -> None:
        """Starts them; each gets the settings with its "rank", the "size" and the "store" to meet at.

        Args:
            module: what each of them runs.
            settings: what each is told.
            ranks: how many.
            cpus: cores to deal.
            share_cores: whether ranks may outnumber them: for what is counted, not for what is timed.

        Raises:
            ValueError: there are more ranks than cores, and they may not share them.
        """
        if share_cores:
            cpus = [cpus[rank % len(cpus)] for rank in range(max(ranks, len(cpus)))]
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
    return join_mesh(settings, 1).everyone


def join_mesh(settings: Message, tp: int, *, in_steps: bool = False) -> RankGroups:
    """The same where `tp` ranks of the team split every layer between them.

    Args:
        settings: the rank's.
        tp: tensor ranks.
        in_steps: exchanges are as a decode engine has them.
    """
    mesh, posted = Mesh.of(settings["size"], tp), Counter[str]()
    if mesh.size == 1:
        return RankGroups.solo(posted)

    def form(store: Store, rank: int, size: int) -> SummingCommunicator:
        lanes = form_groups(store, 1, rank, size, CPU, HOST, GROUP_TIMEOUT)
        group = TorchCommunicator(lanes, CPU, posted)
        return within_host(group, GROUP_TIMEOUT.total_seconds()) if in_steps else group

    return form_rank_groups(mesh, settings["rank"], connect_store(settings["store"], GROUP_TIMEOUT), form)
