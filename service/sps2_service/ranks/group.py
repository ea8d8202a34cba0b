"""A group as its leader sees it: members, and the epoch that binds them.

The leader forms the group when every rank has joined and loaded, and forms it anew, under a new epoch, whenever a
rank is lost or a collective fails. What the group computes is a `Coordinator`'s.
"""

import asyncio
import enum
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from sps2.internal.v1 import engine_pb2
from sps2_service.errors import Unavailable
from sps2_service.ranks.failures import fenced

FORM_TIMEOUT_S = 40.0
REFORM_PAUSE_S = 0.2
BLAME_PAUSE_S = 0.5

log = structlog.get_logger(__name__)

SendCommand = Callable[[engine_pb2.EngineCommand], None]


def _nobody() -> None:
    """Nobody is to be told."""


class Coordinator(Protocol):
    """What a leader does with a formed group. Called on the event loop; must not block."""

    def on_formed(self, epoch: int, ranks: list[engine_pb2.EngineLoaded]) -> None:
        """The group stands; `ranks` are its engines in order of rank."""
        ...

    def on_broken(self, error: Unavailable) -> None:
        """The group is gone: every request of the epoch fails with `error`."""
        ...

    def on_event(self, rank: int, event: engine_pb2.EngineEvent) -> None:
        """An engine reports, within the current epoch."""
        ...


class GroupState(enum.Enum):
    """Where a group is in its life."""

    WAITING = "waiting"
    """Ranks are missing or loading."""
    FORMING = "forming"
    """All are there; the process group is being made."""
    FORMED = "formed"
    """It computes."""


@dataclass
class Member:
    """One rank as the leader knows it."""

    send: SendCommand
    loaded: engine_pb2.EngineLoaded | None = None
    """None while its engine is starting or loading."""
    formed: bool = False
    dismiss: Callable[[], None] = _nobody
    """Tells its supervisor to leave; rank 0 needs no telling."""


@dataclass
class GroupLeader:
    """Keeps a group formed. Everything happens on the event loop, so nothing is locked."""

    name: str
    size: int
    draw_epoch: Callable[[int], Awaitable[int]]
    """Gives an epoch larger than the one it is called with, and than every one before."""
    coordinator: Coordinator
    on_state: Callable[[], None]
    """Told of each change of state."""
    holds_lease: Callable[[], bool] = lambda: True
    """Whether the leader's lease holds: see `LeaseFence`."""
    on_leave: Callable[[str], None] = lambda _why: None
    """Told why the group is to drain and leave; perhaps more than once."""
    state: GroupState = GroupState.WAITING
    epoch: int = 0
    members: dict[int, Member] = field(default_factory=dict)
    _forming: asyncio.Task[None] | None = None
    _failing: asyncio.TimerHandle | None = None
    _dismissed: bool = False

    def check_lease(self) -> None:
        """Raises Unavailable while the leader is fenced: it takes no new work then."""
        if not self.holds_lease():
            why = f"{self.name} has not reached the directory for too long and takes no new work"
            raise fenced(self.name, why)

    def join(self, rank: int, send: SendCommand, dismiss: Callable[[], None] = _nobody) -> Member:
        """A rank's supervisor is there; in place of an earlier one of the same rank."""
        if rank in self.members:
            self.lose(rank, f"{self.name}/{rank} joined again", self.members[rank])
        member = Member(send, dismiss=dismiss)
        self.members[rank] = member
        if self._dismissed:
            dismiss()
        return member

    def leave(self, rank: int, reason: str, member: Member) -> None:
        """A rank's supervisor is gone; an earlier one of the same rank is no news."""
        if self.members.get(rank) is member:
            del self.members[rank]
            self._break(rank, reason)

    def lose(self, rank: int, reason: str, member: Member) -> None:
        """A rank's engine is gone; its supervisor starts it again."""
        if self.members.get(rank) is member:
            member.loaded = None
            self._break(rank, reason)

    def send(self, rank: int, command: engine_pb2.EngineCommand) -> None:
        """Sends a command of the current epoch to one rank."""
        command.epoch = self.epoch
        self.members[rank].send(command)

    def broadcast(self, command: engine_pb2.EngineCommand) -> None:
        """Sends the same command of the current epoch to every rank."""
        command.epoch = self.epoch
        for rank in range(self.size):
            self.members[rank].send(command)

    def on_event(self, rank: int, event: engine_pb2.EngineEvent, member: Member) -> None:
        """Takes what an engine reports: the group's own business here, the rest to the coordinator."""
        if self.members.get(rank) is not member:
            return
        kind = event.WhichOneof("event")
        if kind == "loaded":
            member.loaded = event.loaded
            self._form_if_complete()
        elif event.epoch != self.epoch or self.state is GroupState.WAITING:
            log.debug("an event of an older epoch is dropped", rank=rank, kind=kind)
        elif kind == "store_ready":
            self._invite_followers(event.store_ready.address)
        elif kind == "group_formed":
            self._note_formed(member)
        elif kind == "group_failed":
            self._suspect(
                rank, f"the group of {self.name} failed at rank {rank}: {event.group_failed.reason}"
            )
        elif self.state is GroupState.FORMED:
            self.coordinator.on_event(rank, event)

    def dismiss(self) -> None:
        """The group has drained: everyone leaves, also who joins from now on. It neither forms nor breaks any more."""
        self._dismissed = True
        self.close()
        for member in self.members.values():
            member.dismiss()

    def close(self) -> None:
        """Stops forming and breaking."""
        if self._failing is not None:
            self._failing.cancel()
        if self._forming is not None:
            self._forming.cancel()

    @property
    def missing(self) -> str:
        """What the group waits for, for people."""
        absent = [rank for rank in range(self.size) if rank not in self.members]
        loading = [rank for rank, member in sorted(self.members.items()) if member.loaded is None]
        parts = [f"rank {rank} absent" for rank in absent] + [f"rank {rank} loading" for rank in loading]
        return ", ".join(parts) or "forming"

    def _form_if_complete(self) -> None:
        complete = len(self.members) == self.size and all(m.loaded for m in self.members.values())
        if self._dismissed:
            return
        if self.state is GroupState.WAITING and complete and (self._forming is None or self._forming.done()):
            self._forming = asyncio.create_task(self._form(), name=f"form-{self.name}")

    async def _form(self) -> None:
        epoch = await self.draw_epoch(self.epoch)
        if len(self.members) < self.size or not all(m.loaded for m in self.members.values()):
            return  # somebody left meanwhile; the next to load tries again
        self.epoch, self.state = epoch, GroupState.FORMING
        self.on_state()
        for member in self.members.values():
            member.formed = False
        self.send(0, _form_command(0, self.size, ""))
        await asyncio.sleep(FORM_TIMEOUT_S)
        if self.state is GroupState.FORMING and self.epoch == epoch:
            late = [rank for rank, member in self.members.items() if not member.formed]
            self._break(late[0], f"the group of {self.name} did not form: rank {late[0]} is not there")

    def _invite_followers(self, store_address: str) -> None:
        for rank in range(1, self.size):
            self.send(rank, _form_command(rank, self.size, store_address))

    def _note_formed(self, member: Member) -> None:
        member.formed = True
        if self.state is GroupState.FORMING and all(m.formed for m in self.members.values()):
            self.state = GroupState.FORMED
            log.info("group formed", epoch=self.epoch, ranks=self.size)
            ranks = [loaded for rank in range(self.size) if (loaded := self.members[rank].loaded)]
            self.coordinator.on_formed(self.epoch, ranks)
            self.on_state()
            if self._forming is not None:
                self._forming.cancel()

    def _suspect(self, rank: int, reason: str) -> None:
        """A collective failed: the epoch is over, but what ended it may not be known yet.

        Most often another rank has died, and the survivor's report overtook the news of it. The requests are to
        learn what died, so the news gets a moment.
        """
        if self._failing is None:
            loop = asyncio.get_running_loop()
            self._failing = loop.call_later(BLAME_PAUSE_S, self._break, rank, reason)

    def _break(self, rank: int, reason: str) -> None:
        """Ends the epoch; survivors keep their weights and wait for the next."""
        if self._dismissed:
            return
        if self._failing is not None:
            self._failing.cancel()
            self._failing = None
        was = self.state
        self.state = GroupState.WAITING
        if was is not GroupState.WAITING:
            log.warning("group broken", epoch=self.epoch, reason=reason)
            self.coordinator.on_broken(rank_died(self.name, rank, reason))
            for member in self.members.values():
                abort = engine_pb2.AbortGroup(reason=reason)
                member.send(engine_pb2.EngineCommand(epoch=self.epoch, abort_group=abort))
        self.on_state()
        if self._forming is not None:
            self._forming.cancel()
            self._forming = None
        # Survivors that failed in the same breath report it in this epoch; the next begins after that.
        asyncio.get_running_loop().call_later(REFORM_PAUSE_S, self._form_if_complete)


def rank_died(group: str, rank: int, reason: str) -> Unavailable:
    """What every request of a broken epoch fails with."""
    return Unavailable(
        "RANK_DIED",
        f"{reason}; the request cannot be continued here, send it again",
        retry_after=1.0,
        metadata={"component": f"{group}/{rank}", "group": group},
    )


def _form_command(rank: int, size: int, store_address: str) -> engine_pb2.EngineCommand:
    form = engine_pb2.FormGroup(rank=rank, world_size=size, store_address=store_address)
    return engine_pb2.EngineCommand(form_group=form)
