"""Groups form from what Kubernetes tells their ranks, and form again when a rank is lost and comes back.

The ranks are started with the flags of a rendered release, filled in as the kubelet does; all else is left out.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from support.chart import render
from support.checkpoints import make_tiny_checkpoint
from support.deployment import engine_pid
from support.directory import DirectoryProcess
from support.ports import free_host
from support.process import ManagedProcess
from support.rank_commands import processes as rendered_processes
from support.redis_server import RedisServer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

FORMED_S = 60.0
PLACEMENTS = {"prefill": "lws", "decode": "statefulset"}
"""What both pools share is one code (`sps2_service.ranks`); so each placement is tried in one of them."""

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

    def lose(self, rank: int) -> int:
        """A pod dies and comes back under its own name: how many lines the leader had said before."""
        seen = len(self.running[0].lines) if rank else 0
        self.running[rank].kill()
        self.running[rank] = self.start(self.commands[rank])
        return seen


def groups(start: Start, model: Path, directory: str) -> dict[str, Group]:
    """The first group of each pool of a release."""
    pools = {
        component: {"ranks": 2, "placement": placement, "flags": {"kv-tokens": 1024}}
        for component, placement in PLACEMENTS.items()
    }
    rendered = render({**pools, "metrics": {"enabled": False}})
    found = {}
    for component in PLACEMENTS:
        (workload,) = rendered.part(component)
        pods = list(rendered_processes(workload))[:2]
        hosts = {one.ip: free_host() for one in pods}
        names = hosts | {one.address: hosts[one.ip] for one in pods}  # what the cluster's DNS would say
        given = ["--directory", directory, "--model", str(model), "--model-name", "tiny"]
        found[component] = Group(
            start,
            [
                [sys.executable, "-P", *one.container["command"][1:], *_resolved(one.flags, names), *given]
                for one in pods
            ],
        )
    return found


def _resolved(flags: tuple[str, ...], names: dict[str, str]) -> list[str]:
    return [
        re.sub(r"=(.+):(\d+)$", lambda match: f"={names.get(match[1], match[1])}:{match[2]}", flag)
        for flag in flags
    ]


def test_a_lost_rank_joins_again_and_the_others_keep_their_weights(
    processes: Start,
    redis_server: RedisServer,
    start_directory: Callable[..., DirectoryProcess],
    tmp_path: Path,
) -> None:
    model = make_tiny_checkpoint(tmp_path / "tiny", "llama")
    started = groups(processes, model, start_directory(redis_server.url).address)
    for group in started.values():
        group.begin()
    first = {name: group.formed() for name, group in started.items()}
    # A follower of one pool, the leader of the other.
    lost = {"prefill": 1, "decode": 0}
    kept = {name: engine_pid(group.running[1 - lost[name]].pid) for name, group in started.items()}
    seen = {name: group.lose(lost[name]) for name, group in started.items()}
    for name, group in started.items():
        assert group.formed(seen[name]) > first[name]
        assert engine_pid(group.running[1 - lost[name]].pid) == kept[name]
