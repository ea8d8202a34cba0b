"""Groups of ranks that are started with the flags of a rendered release, filled in as the kubelet does.

All else of Kubernetes is left out: a pod is a process on a loopback address of its own.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from support.chart import render
from support.deployment import engine_pid
from support.ports import free_host
from support.process import ManagedProcess
from support.rank_commands import processes

FORMED_S = 60.0
Start = Callable[..., ManagedProcess]


@dataclass
class Group:
    """The pods of one group, as processes on addresses of their own."""

    start: Start
    commands: list[list[str]]
    """Of each rank."""
    running: list[ManagedProcess] = field(default_factory=list)

    def begin(self) -> None:
        """Starts every rank, the last first: whoever comes before the leader waits for it."""
        self.running = [self.start(command) for command in reversed(self.commands)][::-1]

    def formed(self, after: int = 0) -> int:
        """The epoch that the leader tells of when the group stands."""
        line = self.running[0].wait_for_line(r'.*"event": "group formed".*', FORMED_S, after=after).group(0)
        (epoch,) = re.findall(r'"epoch": (\d+)', line)
        return int(epoch)

    def restart(self, rank: int) -> None:
        """Its pod dies and comes back under its own name."""
        self.running[rank].kill()
        self.running[rank] = self.start(self.commands[rank])


def group_of(start: Start, component: str, placement: str, model: Path, directory: str) -> Group:
    """The first group of a pool of a release, two ranks."""
    pool = {"ranks": 2, "placement": placement, "flags": {"kv-tokens": 1024}}
    rendered = render({component: pool, "metrics": {"enabled": False}})
    (workload,) = rendered.part(component)
    pods = list(processes(workload))[:2]
    hosts = {one.ip: free_host() for one in pods}
    names = hosts | {one.address: hosts[one.ip] for one in pods}  # what the cluster's DNS would say
    given = ["--directory", directory, "--model", str(model), "--model-name", "tiny"]
    commands = [
        [sys.executable, "-P", *one.container["command"][1:], *_resolved(one.flags, names), *given]
        for one in pods
    ]
    return Group(start, commands)


def lose_and_rejoin(group: Group, rank: int) -> int:
    """A rank dies and comes back: the epoch that then stands. The other one keeps its engine, and so its weights."""
    survivor = engine_pid(group.running[1 - rank].pid)
    before = len(group.running[0].lines) if rank else 0
    group.restart(rank)
    epoch = group.formed(before)
    assert engine_pid(group.running[1 - rank].pid) == survivor
    return epoch


def _resolved(flags: tuple[str, ...], names: dict[str, str]) -> list[str]:
    return [
        re.sub(r"=(.+):(\d+)$", lambda match: f"={names.get(match[1], match[1])}:{match[2]}", flag)
        for flag in flags
    ]
