"""Groups that come and go while a deployment runs: each is a few processes, looked at again and again.

Knows how one group starts and how one leaves; which do, and what is said of it, is `elastic`'s business.
"""

import signal
import time
from collections.abc import Callable, Sequence

from sps2_cli.local.logs import cause
from sps2_cli.local.plan import Role
from sps2_cli.local.process import ChildProcess, exit_text
from sps2_cli.local.reporter import missing
from sps2_client import ClusterState

LEAVE_TOGETHER_S = 10.0
"""What the other ranks of a group that leaves by itself get before they are told to."""


class JoiningGroup:
    """A group from its first process to ready."""

    def __init__(
        self,
        role: Role,
        number: int,
        leader: ChildProcess,
        start_followers: Callable[[str], list[ChildProcess]],
        deadline: float,
    ) -> None:
        """`start_followers` gets the leader's address; `deadline` is of time.monotonic()."""
        self.role, self.number = role, number
        self.name = f"{role}-{number}"
        self.began = time.monotonic()
        self.children = [leader]
        self._start_followers: Callable[[str], list[ChildProcess]] | None = start_followers
        self._deadline = deadline

    @property
    def listens(self) -> bool:
        """Whether all its processes have been started and listen; starts them as their leader's address is known."""
        if self._start_followers is not None and (address := self.children[0].poll_address()) is not None:
            self.children += self._start_followers(address)
            self._start_followers = None
        return self._start_followers is None and all(
            child.poll_address() is not None for child in self.children
        )

    def failure(self, now: float) -> str | None:
        """Why it will not become ready, for people."""
        for child in self.children:
            if child.exit_code is not None:
                reason = cause(child.log.tail) or "it said nothing"
                return f"{child.name} failed to start ({exit_text(child.exit_code)}): {reason}"
        if now >= self._deadline:
            return f"{self.name} was not ready after {now - self.began:.0f} s"
        return None

    def ready(self, state: ClusterState) -> bool:
        """Whether the router may use it."""
        return not missing([child.name for child in self.children], state)


class LeavingGroup:
    """A group from the first word of its drain to its last process."""

    def __init__(
        self, role: Role, number: int, children: Sequence[ChildProcess], *, ask: bool, deadline: float
    ) -> None:
        """`ask`: tell it to drain now; otherwise it drains already. After `deadline` it is killed."""
        self.role, self.number = role, number
        self.name = f"{role}-{number}"
        self.began = time.monotonic()
        self.children = list(children)
        self._deadline = deadline
        self._ask_at = self.began if ask else self.began + LEAVE_TOGETHER_S
        self._asked = False

    def step(self, now: float) -> bool:
        """Does what is due; whether all its processes have ended."""
        if not self._asked and now >= self._ask_at:
            self._asked = True
            for child in self.children:
                child.send(signal.SIGTERM)  # to all at once, as Kubernetes does: the leader drains for all
        if all(child.exit_code is not None for child in self.children):
            return True
        if now >= self._deadline:
            for child in self.children:
                child.kill()
            return True
        return False

    @property
    def unclean(self) -> str | None:
        """What went wrong, for people; None when every process ended by itself."""
        ends = [(child.name, child.exit_code) for child in self.children if child.exit_code != 0]
        return ", ".join(f"{name}: {exit_text(code or 0)}" for name, code in ends) or None
