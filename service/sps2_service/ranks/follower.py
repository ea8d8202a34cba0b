"""The follower's side of JoinGroup: relays its engine's events up, and the leader's commands down.

A follower leaves with its group. Told to end, it asks the leader to drain the group, and works on until it is
dismissed; a leader that is gone needs it no more.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import structlog

from sps2.internal.v1 import engine_pb2, group_service_pb2
from sps2.internal.v1.group_service_pb2_grpc import GroupServiceStub
from sps2_service.channel import open_channel
from sps2_service.directory_registration import Registration
from sps2_service.ranks.engine_process import EngineProcess
from sps2_service.tls import Tls

REJOIN_PAUSE_S = 0.3

log = structlog.get_logger(__name__)


class Follower:
    """Keeps one rank joined to its leader for the life of the supervisor."""

    def __init__(
        self,
        hello: group_service_pb2.FollowerHello,
        leader_address: str,
        name: str,
        registration: Registration,
        on_dismissed: Callable[[], None],
        tls: Tls | None,
    ) -> None:
        """`on_dismissed` is called when the group has drained, perhaps without this rank having been told to end."""
        self._hello = hello
        self._registration = registration
        self._on_dismissed = on_dismissed
        self._leaving = False
        self._may_leave = asyncio.Event()
        self._leader_address = leader_address
        self._name = name
        self._tls = tls
        self._engine: EngineProcess | None = None
        self._loaded: engine_pb2.EngineEvent | None = None
        self._outgoing: asyncio.Queue[group_service_pb2.JoinGroupRequest] = asyncio.Queue()
        self.epoch = 0
        """Epoch of the last command."""
        self.formed = False
        """Whether this rank's engine is in a group."""

    def attach(self, engine: EngineProcess) -> None:
        """Names the engine; before `run`."""
        self._engine = engine

    def on_event(self, event: engine_pb2.EngineEvent) -> None:
        """Relays what the engine reports (its heartbeats stay with its own supervisor)."""
        kind = event.WhichOneof("event")
        if kind in {"heartbeat", "load_progress", "load_failed"}:
            return
        if kind == "loaded":
            self._loaded = event
        elif kind in ("group_formed", "group_failed"):
            self.formed = kind == "group_formed"
        self._outgoing.put_nowait(group_service_pb2.JoinGroupRequest(event=event))

    def on_lost(self, reason: str) -> None:
        """Tells the leader that the engine is gone."""
        self._loaded, self.formed = None, False
        lost = group_service_pb2.EngineLost(reason=reason)
        self._outgoing.put_nowait(group_service_pb2.JoinGroupRequest(lost=lost))

    async def leave(self) -> None:
        """Has the group drain; returns when it has, or when there is no group to wait for."""
        self._leaving = True
        leaving = group_service_pb2.FollowerLeaving()
        self._outgoing.put_nowait(group_service_pb2.JoinGroupRequest(leaving=leaving))
        await self._may_leave.wait()

    async def run(self) -> None:
        """Joins, and joins again whenever the stream ends; runs until cancelled."""
        async with open_channel(self._leader_address, tls=self._tls) as channel:
            join: Any = GroupServiceStub(channel).JoinGroup  # the stub's annotations are the blocking API's
            while True:
                if not self._leaving:
                    await self._stay_joined(join)
                    self._leave_epoch()
                if self._leaving:
                    self._may_leave.set()
                if self._may_leave.is_set():
                    await asyncio.Event().wait()  # until the supervisor, which leaves now, cancels it
                await asyncio.sleep(REJOIN_PAUSE_S)

    async def _stay_joined(self, join: Any) -> None:
        assert self._engine is not None, "attach comes before run"
        self._outgoing = asyncio.Queue()
        self._outgoing.put_nowait(group_service_pb2.JoinGroupRequest(hello=self._hello))
        if self._loaded is not None:
            self._outgoing.put_nowait(group_service_pb2.JoinGroupRequest(event=self._loaded))
        # No deadline: the stream lives as long as both ends do, and keepalive ends it when one does not.
        call = join(self._relay())
        try:
            async for response in call:
                self._take(response)
            log.info("the leader ended the stream", leader=self._leader_address)
        except grpc.aio.AioRpcError as error:
            log.info("not joined", leader=self._leader_address, code=error.code().name, why=error.details())
        finally:
            call.cancel()

    def _take(self, response: group_service_pb2.JoinGroupResponse) -> None:
        assert self._engine is not None
        if response.HasField("leave"):
            self._may_leave.set()
            self._on_dismissed()
            return
        if response.HasField("renewal_wanted"):
            self._lend(response.renewal_wanted.number)
            return
        if response.HasField("renewal_result"):
            self._registration.on_carried(response.renewal_result.number, response.renewal_result.status)
            return
        command = response.command
        self.epoch = command.epoch
        if command.HasField("abort_group"):
            self.formed = False
        self._engine.send(command)

    def _lend(self, number: int) -> None:
        renewal = self._registration.lend(number)
        if renewal is not None:
            carried = group_service_pb2.CarriedRenewal(number=number, renewal=renewal)
            self._outgoing.put_nowait(group_service_pb2.JoinGroupRequest(renewal=carried))

    async def _relay(self) -> AsyncIterator[group_service_pb2.JoinGroupRequest]:
        outgoing = self._outgoing
        while True:
            yield await outgoing.get()

    def _leave_epoch(self) -> None:
        """Without a leader the group is over: the engine frees what it holds and keeps its weights."""
        if self._engine is not None and self.formed:
            abort = engine_pb2.AbortGroup(reason=f"{self._name} lost its leader")
            self._engine.send(engine_pb2.EngineCommand(epoch=self.epoch, abort_group=abort))
        self.formed = False
