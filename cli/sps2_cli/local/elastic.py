"""The groups of a running deployment: which serve, which come, which go, and what `sps2 scale` asks of them.

A loop calls `step` between its looks at the children; nothing here waits for long. One request to scale is served at a
time. Groups that leave of their own accord (drained by an operator, or by a signal) are seen off here too.
"""

import time
from collections.abc import Sequence
from typing import Protocol

from sps2_cli.local.control import Call
from sps2_cli.local.groups import JoiningGroup, LeavingGroup
from sps2_cli.local.plan import Role, UpOptions
from sps2_cli.local.process import ChildProcess
from sps2_cli.local.reporter import Reporter
from sps2_cli.local.scaling import ROLES, RefusedError, parse_targets, plan_changes
from sps2_client import ClusterState

LOOK_INTERVAL_S = 0.1


class Host(Protocol):
    """What the deployment does for it."""

    def start_leader(self, role: Role, number: int) -> ChildProcess:
        """Starts rank 0 of a new group."""
        ...

    def start_followers(self, role: Role, number: int, leader: str) -> list[ChildProcess]:
        """Starts its other ranks, once the leader's address is known."""
        ...

    def group_children(self, name: str) -> list[ChildProcess]:
        """The processes of a group."""
        ...

    def remove(self, children: Sequence[ChildProcess]) -> None:
        """Ends what is left of them, and forgets them."""
        ...

    def cluster_state(self) -> ClusterState | None:
        """What the router says; None when it does not answer."""
        ...


class ElasticPools:
    """The pools of one deployment."""

    def __init__(self, options: UpOptions, host: Host, reporter: Reporter) -> None:
        self._options = options
        self._host = host
        self._reporter = reporter
        self._serving: dict[Role, list[int]] = {
            role: list(range(options.pool_of(role).groups)) for role in ROLES
        }
        """Numbers of the groups that are there to stay, the oldest first."""
        self._joining: list[JoiningGroup] = []
        self._leaving: list[LeavingGroup] = []
        self._call: Call | None = None
        self._failures: list[str] = []
        self._looked_at = 0.0

    def owns(self, child: ChildProcess) -> bool:
        """Whether its end is no business of who watches over the processes that serve."""
        joining = any(child in group.children for group in self._joining)
        return joining or any(child in group.children for group in self._leaving)

    def take(self, call: Call) -> None:
        """Begins what `sps2 scale` asks for, or refuses it."""
        if self._call is not None:
            call.end("refused", message="another `sps2 scale` is under way here; wait for it")
            return
        try:
            targets = parse_targets([f"{role}={count}" for role, count in call.asked["scale"].items()])
            taken = {role: [one.number for one in self._leaving if one.role == role] for role in ROLES}
            changes = plan_changes(targets, self._serving, taken, self._options)
        except (KeyError, AttributeError, ValueError) as error:
            is_ours = isinstance(error, RefusedError)
            call.end("refused", message=str(error) if is_ours else f"not a request to scale: {error}")
            return
        self._call, self._failures = call, []
        for change in changes:
            for number in change.add:
                self._join(change.role, number)
            for number in change.drain:
                self.see_off(change.role, number, ask=True)
        self._end_call_if_done()

    def see_off(self, role: Role, number: int, *, ask: bool) -> None:
        """A group leaves: told to (`ask`), or of its own accord."""
        self._serving[role].remove(number)
        children = self._host.group_children(f"{role}-{number}")
        deadline = time.monotonic() + self._options.drain_timeout
        group = LeavingGroup(role, number, children, ask=ask, deadline=deadline)
        self._leaving.append(group)
        self._say("draining", f"{group.name} is draining", group=group.name)

    def step(self) -> None:
        """Looks at who comes and goes."""
        now = time.monotonic()
        for leaving in [one for one in self._leaving if one.step(now)]:
            self._left(leaving, now)
        for joining in self._joining:
            if (failure := joining.failure(now)) is not None:
                self._not_joined(joining, failure)
                return  # the list has changed
        if self._joining and now - self._looked_at >= LOOK_INTERVAL_S:
            self._looked_at = now
            self._look(now)

    def close(self) -> None:
        """The deployment ends; whoever waits is told."""
        if self._call is not None:
            self._call.end("failed", message="`sps2 up` is ending")
            self._call = None

    def _join(self, role: Role, number: int) -> None:
        def start_followers(leader: str) -> list[ChildProcess]:
            return self._host.start_followers(role, number, leader)

        name = f"{role}-{number}"
        self._say("starting", f"{name} is starting", group=name)
        try:
            leader = self._host.start_leader(role, number)
        except OSError as error:
            self._not_started(name, f"{name} cannot be started: {error}")
            return
        deadline = time.monotonic() + self._options.ready_timeout
        self._joining.append(JoiningGroup(role, number, leader, start_followers, deadline))

    def _look(self, now: float) -> None:
        listening = []
        for group in list(self._joining):
            try:
                if group.listens:  # looking is what starts its followers
                    listening.append(group)
            except OSError as error:
                # The machine has no room for another process; those that serve are to go on.
                self._not_joined(group, f"{group.name} cannot be started: {error}")
        state = self._host.cluster_state() if listening else None
        for group in listening:
            if state is not None and group.ready(state):
                self._joining.remove(group)
                self._serving[group.role].append(group.number)
                took = now - group.began
                self._say("ready", f"{group.name} is ready after {took:.1f} s", group=group.name, took_s=took)
        self._end_call_if_done()

    def _left(self, group: LeavingGroup, now: float) -> None:
        self._leaving.remove(group)
        unclean, took = group.unclean, now - group.began
        self._host.remove(group.children)
        text = f"{group.name} has left after {took:.1f} s"
        if unclean is not None:
            text += f", not cleanly ({unclean})"
            self._failures.append(text)
        self._say("left", text, group=group.name, took_s=took, clean=unclean is None)
        self._end_call_if_done()

    def _not_joined(self, group: JoiningGroup, failure: str) -> None:
        self._joining.remove(group)
        self._host.remove(group.children)
        self._not_started(group.name, failure)
        self._end_call_if_done()

    def _not_started(self, name: str, failure: str) -> None:
        self._failures.append(failure)
        self._say("not_started", failure, group=name)

    def _end_call_if_done(self) -> None:
        if self._call is None or self._joining or self._leaving:
            return
        call, self._call = self._call, None
        counts = {role: len(numbers) for role, numbers in self._serving.items()}
        if self._failures:
            call.end("failed", message="; ".join(self._failures), groups=counts)
        else:
            call.end("scaled", groups=counts)

    def _say(self, kind: str, text: str, **fields: object) -> None:
        self._reporter.event(kind, text, **fields)
        if self._call is not None:
            self._call.say(kind, text=text, **fields)


def place_of(group: str) -> tuple[Role, int]:
    """Pool and number of a group, from its name."""
    name, _, number = group.rpartition("-")
    return next(role for role in ROLES if role == name), int(number)
