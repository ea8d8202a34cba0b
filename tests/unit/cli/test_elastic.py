"""`sps2 scale` without a process: what is planned, how it is asked for, what becomes of groups that come and go."""

import json
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sps2_cli.local.control import Call, ControlServer, Event, ask
from sps2_cli.local.elastic import ElasticPools, place_of
from sps2_cli.local.plan import Cores, Pool, Role, UpOptions
from sps2_cli.local.process import ChildProcess
from sps2_cli.local.reporter import Reporter
from sps2_cli.local.scaling import PoolChange, RefusedError, parse_targets, plan_changes
from sps2_client import ClusterState
from support.ports import free_port
from support.waiting import wait_until

OPTIONS = UpOptions(
    model=Path("/m/demo"),
    prefill=Pool(1, 2),
    decode=Pool(2, 1),
    threads=2,
    decode_cpus=Cores((0, 1, 2, 3, 4, 5)),
)
NOBODY: dict[Role, Sequence[int]] = {"prefill": (), "decode": ()}


def test_words_name_pools() -> None:
    assert parse_targets(["prefill=3", "decode=1"]) == {"prefill": 3, "decode": 1}
    with pytest.raises(ValueError, match="say which pool"):
        parse_targets([])


def test_new_groups_take_free_numbers_and_the_youngest_go() -> None:
    groups: dict[Role, Sequence[int]] = {"prefill": [0, 3, 1], "decode": [0, 1]}
    taken: dict[Role, Sequence[int]] = {"prefill": [2], "decode": ()}
    assert plan_changes({"prefill": 5, "decode": 2}, groups, taken, OPTIONS) == [
        PoolChange("prefill", (4, 5), ()),
        PoolChange("decode", (), ()),
    ]
    assert plan_changes({"prefill": 1}, groups, taken, OPTIONS) == [PoolChange("prefill", (), (1, 3))]


def test_too_many_ranks_or_too_few_cores_are_refused() -> None:
    groups: dict[Role, Sequence[int]] = {"prefill": [0], "decode": [0, 1]}
    with pytest.raises(RefusedError, match="129 prefill groups of 2 ranks are 258, at most 256"):
        plan_changes({"prefill": 129}, groups, NOBODY, OPTIONS)
    assert plan_changes({"decode": 3}, groups, NOBODY, OPTIONS)[0].add == (2,)
    with pytest.raises(RefusedError, match=r"need 8 cores, and the pool is pinned to 6 \(0,1,2,3,4,5\)"):
        plan_changes({"decode": 4}, groups, NOBODY, OPTIONS)


def test_the_name_of_a_group_says_where_it_is() -> None:
    assert [place_of(name) for name in ("prefill-0", "decode-12")] == [("prefill", 0), ("decode", 12)]


# --- the socket ----------------------------------------------------------------------------------------------


@pytest.fixture
def control() -> Iterator[tuple[int, ControlServer]]:
    port = free_port()
    server = ControlServer(port)
    yield port, server
    server.close()


def test_events_come_back_to_who_asked(control: tuple[int, ControlServer]) -> None:
    port, server = control
    assert server.poll() is None
    heard: list[Event] = []
    asking = threading.Thread(target=lambda: heard.extend(ask(port, {"scale": {"decode": 2}})))
    asking.start()
    calls: list[Call] = []

    def has_asked() -> bool:
        if (call := server.poll()) is not None:
            calls.append(call)
        return bool(calls)

    wait_until(has_asked)
    assert calls[0].asked == {"scale": {"decode": 2}}
    calls[0].say("starting", group="decode-1")
    calls[0].end("scaled")
    asking.join(5)
    assert heard == [{"event": "starting", "group": "decode-1"}, {"event": "scaled"}]
    calls[0].say("nobody listens any more")


def test_a_port_has_one_deployment_and_others_none(control: tuple[int, ControlServer]) -> None:
    with pytest.raises(OSError, match="in use"):
        ControlServer(control[0])
    with pytest.raises(ConnectionRefusedError):
        next(ask(free_port(), {}))


# --- groups that come and go -----------------------------------------------------------------------------------


class Child:
    """A process that does what the test says."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.address: str | None = None
        self.exit_code: int | None = None
        self.signals: list[int] = []
        self.log = SimpleNamespace(tail=["no weights"])

    def poll_address(self) -> str | None:
        return self.address

    def send(self, signum: int) -> None:
        self.signals.append(signum)

    def kill(self) -> None:
        self.exit_code = -9 if self.exit_code is None else self.exit_code


class Host:
    """A deployment of such processes."""

    def __init__(self) -> None:
        names = ["prefill-0/0", "prefill-0/1", "decode-0/0", "decode-1/0"]
        self.children = {name: Child(name) for name in names}
        self.ready: set[str] = set()

    def _start(self, name: str) -> Any:
        self.children[name] = Child(name)
        return self.children[name]

    def start_leader(self, role: Role, number: int) -> ChildProcess:
        return cast("ChildProcess", self._start(f"{role}-{number}/0"))

    def start_followers(self, role: Role, number: int, leader: str) -> list[ChildProcess]:
        assert leader
        ranks = range(1, OPTIONS.pool_of(role).ranks)
        return [self._start(f"{role}-{number}/{rank}") for rank in ranks]

    def group_children(self, name: str) -> list[ChildProcess]:
        return [
            cast("ChildProcess", one) for one in self.children.values() if one.name.startswith(f"{name}/")
        ]

    def remove(self, children: Sequence[ChildProcess]) -> None:
        for child in children:
            child.kill()
            del self.children[child.name]

    def cluster_state(self) -> ClusterState | None:
        workers = [SimpleNamespace(worker_id=one, state="ready") for one in self.ready]
        return cast("ClusterState", SimpleNamespace(workers=workers))


class Asking:
    """A call whose answers are kept."""

    def __init__(self, **targets: object) -> None:
        self.asked: Event = {"scale": targets}
        self.kinds: list[str] = []
        self.last: dict[str, object] = {}

    def say(self, kind: str, **fields: object) -> None:
        self.kinds.append(kind)
        self.last = fields

    end = say


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def pools(host: Host, monkeypatch: pytest.MonkeyPatch) -> ElasticPools:
    monkeypatch.setattr("sps2_cli.local.elastic.LOOK_INTERVAL_S", 0.0)
    return ElasticPools(OPTIONS, host, Reporter(as_json=True))


def scale(pools: ElasticPools, **targets: object) -> Asking:
    asking = Asking(**targets)
    pools.take(cast("Call", asking))
    pools.step()
    return asking


def test_a_group_joins_rank_by_rank(pools: ElasticPools, host: Host) -> None:
    asking = scale(pools, prefill=2)
    assert "prefill-1/1" not in host.children, "its leader's address is not known yet"
    assert pools.owns(cast("ChildProcess", host.children["prefill-1/0"]))
    host.children["prefill-1/0"].address = "h:1"
    pools.step()
    host.children["prefill-1/1"].address = "h:2"
    pools.step()
    assert asking.kinds == ["starting"]
    host.ready = {"prefill-1/0", "prefill-1/1"}
    pools.step()
    assert asking.kinds == ["starting", "ready", "scaled"]
    assert asking.last == {"groups": {"prefill": 2, "decode": 2}}
    assert not pools.owns(cast("ChildProcess", host.children["prefill-1/0"]))


def test_a_group_that_does_not_start_is_taken_away(pools: ElasticPools, host: Host) -> None:
    asking = scale(pools, prefill=2)
    host.children["prefill-1/0"].exit_code = 1
    pools.step()
    assert asking.kinds == ["starting", "not_started", "failed"]
    assert "prefill-1/0 failed to start (exit code 1): no weights" in str(asking.last["message"])
    assert asking.last["groups"] == {"prefill": 1, "decode": 2}
    assert "prefill-1/0" not in host.children


def test_the_youngest_is_told_once_and_seen_off(pools: ElasticPools, host: Host) -> None:
    asking = scale(pools, decode=1)
    pools.step()
    gone = host.children["decode-1/0"]
    assert (gone.signals, host.children["decode-0/0"].signals) == ([signal.SIGTERM], [])
    busy = scale(pools, decode=3)
    assert busy.kinds == ["refused"]
    gone.exit_code = 0
    pools.step()
    assert asking.kinds == ["draining", "left", "scaled"]
    assert "decode-1/0" not in host.children
    again = scale(pools, decode=1)
    assert again.kinds == ["scaled"], "there is nothing to do"


def test_a_group_that_is_killed_on_its_way_out_is_told(pools: ElasticPools, host: Host) -> None:
    asking = scale(pools, decode=1)
    host.children["decode-1/0"].exit_code = -9
    pools.step()
    assert asking.kinds == ["draining", "left", "failed"]
    assert "decode-1/0: killed by SIGKILL" in str(asking.last["message"])


def test_a_group_that_leaves_of_its_own_accord_is_not_told_to(pools: ElasticPools, host: Host) -> None:
    pools.see_off("prefill", 0, ask=False)
    host.children["prefill-0/0"].exit_code = 0
    pools.step()
    assert host.children["prefill-0/1"].signals == [], "it is about to leave by itself"
    host.children["prefill-0/1"].exit_code = 0
    pools.step()
    assert sorted(host.children) == ["decode-0/0", "decode-1/0"]
    assert scale(pools, prefill=1).kinds == ["starting"], "its number is free again"


def test_what_is_no_request_is_refused(pools: ElasticPools) -> None:
    for asking in (Asking(gpu=1), Asking(decode="many")):
        pools.take(cast("Call", asking))
        assert asking.kinds == ["refused"], json.dumps(asking.asked)
