"""Groups that come and go under load: what is asked meanwhile, what came of it, and how soon a new group was used."""

import json
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any, Self

from sps2_client import Client, SPS2Error
from support.deployment import SPS2, LocalDeployment
from support.faults import command_of, members
from support.identity import Tally, reference
from support.oracle import compare
from support.streams import Answered, Asked, ask
from support.waiting import wait_until

SCALE_TIMEOUT_S = 120.0


@dataclass
class Load:
    """Clients that ask for the same requests again and again, each answer held against that of an idle deployment."""

    address: str
    model: Path
    requests: Sequence[Asked]
    alone: Sequence[Answered]
    num_clients: int = 3
    max_retries: int = 0
    """Of a connection that is lost before the first token."""
    tally: Tally = field(default_factory=Tally)
    num_answers: int = 0
    failures: list[str] = field(default_factory=list)
    longest_s: float = 0.0
    """The slowest answer."""

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._next = count()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(self.num_clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(SCALE_TIMEOUT_S)
        assert not any(thread.is_alive() for thread in self._threads), "a request hangs"

    def check(self) -> None:
        """Fails where a request has, or its tokens differ."""
        assert not self.failures, f"{len(self.failures)} of {self.num_answers} failed: {self.failures[:3]}"
        assert self.num_answers > 0, "nothing was asked"
        self.tally.check()

    def _run(self) -> None:
        with Client(self.address, max_retries=self.max_retries) as client:
            while not self._stop.is_set():
                with self._lock:
                    index = next(self._next) % len(self.requests)
                self._ask(client, index)

    def _ask(self, client: Client, index: int) -> None:
        asked, one = self.requests[index], self.alone[index]
        began = time.monotonic()
        failure = ""
        try:
            answer = ask(client, asked)
        except SPS2Error as error:
            failure = repr(error)
        with self._lock:
            self.num_answers += 1
            self.longest_s = max(self.longest_s, time.monotonic() - began)
            try:
                if not failure:
                    found = same_tokens(self.model, asked, answer.token_ids, one.token_ids)
                    self.tally.num_compared += found.num_compared
                    self.tally.num_flips += found.num_flips
            except AssertionError as error:
                failure = f"tokens differ: {error}"
            if failure:
                self.failures.append(failure)


def scale(running: LocalDeployment, *pools: str) -> list[dict[str, Any]]:
    """`sps2 scale` as a user calls it; its events."""
    command = [*SPS2, "scale", *pools, "--server", running.address, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SCALE_TIMEOUT_S, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{running.process.tail(120)}"
    return [json.loads(line) for line in done.stdout.splitlines()]


def states(client: Client) -> dict[str, str]:
    """State of each group's leader."""
    return {one.group: one.state for one in client.cluster_state().workers if one.rank == 0}


def wait_for_groups(client: Client, *names: str, timeout: float = 30.0) -> None:
    """Returns when these groups are ready and there are no others."""
    wait_until(lambda: states(client) == dict.fromkeys(names, "ready"), timeout)


@dataclass(frozen=True)
class Use:
    """A group that became ready, and how soon it had its first attempt."""

    group: str
    after_s: float | None
    """By the router's log; None: it had none yet."""


def uses(router_log: Path) -> list[Use]:
    """Every time a group became ready, as the router's log has it."""
    ready: list[tuple[str, datetime]] = []
    first: dict[tuple[str, datetime], float] = {}
    open_since: dict[str, datetime] = {}
    for event in _events(router_log):
        at = datetime.fromisoformat(event["timestamp"])
        if event["event"] == "group" and event["state"] == "ready":
            ready.append((event["group"], at))
            open_since[event["group"]] = at
        elif event["event"] == "attempt begins":
            for group in (event["prefill"], event["decode"]):
                if (since := open_since.pop(group, None)) is not None:
                    first[group, since] = (at - since).total_seconds()
    return [Use(group, first.get((group, at))) for group, at in ready]


def attempts_after_draining(router_log: Path) -> list[str]:
    """Groups that were given an attempt while the router knew that they drain; should be none."""
    draining: set[str] = set()
    wrong: list[str] = []
    for event in _events(router_log):
        if event["event"] == "group":
            (draining.add if event["state"] == "draining" else draining.discard)(event["group"])
        elif event["event"] == "attempt begins":
            wrong += [one for one in (event["prefill"], event["decode"]) if one in draining]
    return wrong


def _events(log: Path) -> Iterator[dict[str, Any]]:
    for line in log.read_text(encoding="utf-8").splitlines():
        if line.startswith("{"):
            yield json.loads(line)


def handed_back(logs: Path, group: str) -> list[int]:
    """How many attempts the leader of a group has handed back, at each of its drains."""
    log = logs / f"{group}-0.log"
    return [event["count"] for event in _events(log) if event["event"] == "attempts handed back"]


def group_of(client: Client, pool: str) -> str:
    """The group that serves the one request there is."""
    (found,) = (
        name
        for name, num_requests in client.cluster_state().num_requests_by_group.items()
        if num_requests and name.startswith(pool)
    )
    return found


def same_tokens(model: Path, asked: Asked, tokens: Sequence[int], expected: Sequence[int]) -> Tally:
    """Compares them; a greedy stream may flip at a near-tie, as the oracle's logits tell."""
    gaps: Sequence[float] = [float("inf")] * asked.num_tokens
    if list(tokens) != list(expected) and asked.seed is None:
        _, gaps = reference(model, asked.prompt, asked.num_tokens)
    tally = Tally()
    tally.add(compare(tokens, expected, gaps))
    return tally


def rank_pid(running: LocalDeployment, group: str, rank: int) -> int:
    """The supervisor of one rank, also of a group that was not there at the start."""
    for pid in members(running.process.pid):
        if f" --group {group} --rank {rank} " in command_of(pid):
            return pid
    raise AssertionError(f"{group}/{rank} does not run")


def exits(running: LocalDeployment, group: str) -> list[bool]:
    """Whether a group ended cleanly, each time that it has left, as `sps2 up` has it."""
    events = [json.loads(line) for line in running.process.lines if line.startswith('{"event": "left"')]
    return [event["clean"] for event in events if event["group"] == group]
