"""The engine's main loop: receive a command, execute it, report. Knows nothing of prefill or decode.

Three threads: this one computes; the link's reads commands; one sends a heartbeat twice a second. What goes wrong
inside a group ends the epoch, not the process: weights stay, the supervisor forms the group anew.
"""

import gc
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

import torch
from torch.distributed.distributed_c10d import Store

from sps2.internal.v1 import engine_pb2
from sps2_engine.collectives import (
    GroupError,
    SummingCommunicator,
    TorchCommunicator,
    connect_store,
    form_groups,
    meet,
    open_store,
)
from sps2_engine.host_exchange import within_host
from sps2_engine.mesh import Mesh
from sps2_engine.rank_groups import RankGroups, form_rank_groups
from sps2_engine.runtime.link import SupervisorLink

_log = logging.getLogger(__name__)

HEARTBEAT_S = 0.5
FORM_TIMEOUT = timedelta(seconds=30)
CONNECT_TIMEOUT = timedelta(seconds=5)
"""The store is there before anybody is told its address."""
NEVER = 1 << 62
LOAD_REPORT_STEP = 0.02


class Role(Protocol):
    """What an engine does with its weights: prefill or decode.

    `load`, `join`, `reset` and `execute` are called on the main thread, one at a time; `notice` on the link's
    thread while `execute` may be running; the properties on the heartbeat's thread.
    """

    steps_done: int
    """Grows while the engine progresses."""
    bytes_posted: Counter[str]
    exposed_s: float
    """Seconds spent waiting for exchanges of attention, with nothing left to compute."""
    exchanges_in_steps: bool
    """Whether its exchanges are small and waited for, rather than large and hidden behind compute."""

    @property
    def kv_blocks_used(self) -> int:
        """Blocks of the arena that requests hold."""
        ...

    @property
    def kv_blocks_cached(self) -> int:
        """Blocks that hold nothing but what later requests may want."""
        ...

    def load(self, progress: Callable[[float], None]) -> engine_pb2.EngineLoaded:
        """Loads weights and warms up; called once."""
        ...

    def join(self, groups: RankGroups, epoch: int) -> None:
        """The groups of a mesh stand; commands follow."""
        ...

    def reset(self) -> None:
        """The group is gone: forget every request and free all that it held."""
        ...

    def execute(self, command: engine_pb2.EngineCommand) -> None:
        """Does what a command of this role says.

        Raises:
            GroupError: a collective failed.
        """
        ...

    def notice(self, command: engine_pb2.EngineCommand) -> None:
        """A command has arrived and waits for its turn (a cancel takes effect early); HoldLease has no turn."""
        ...


class EngineHost:
    """Runs a role until the supervisor says Shutdown.

    Args:
        link: to the supervisor.
        role: what it does with its weights.
        device: where it computes.
        host: interface address that collectives and stores are bound to.
        collective_timeout: longest wait for a peer inside a collective.
        tp: tensor ranks of every mesh that forms.
    """

    def __init__(
        self,
        link: SupervisorLink,
        role: Role,
        device: torch.device,
        host: str,
        collective_timeout: timedelta,
        tp: int = 1,
    ) -> None:
        self._link = link
        self._role = role
        self._device = device
        self._host = host
        self._collective_timeout = collective_timeout
        self._tp = tp
        self._commands: queue.SimpleQueue[engine_pb2.EngineCommand] = queue.SimpleQueue()
        self._groups: RankGroups | None = None
        self._epoch = 0
        self._ended_epoch = 0
        """Epochs up to this one are over, also while the command that says so waits for its turn."""
        self._busy = False

    def run(self) -> None:
        """Loads, then executes commands in order; returns on Shutdown."""
        self._link.start(self._on_command)
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        loaded = self._role.load(self._report_load())
        # What is loaded stays: looking through it, the garbage collector would stop steps for many milliseconds.
        gc.collect()
        gc.freeze()
        self._link.send(engine_pb2.EngineEvent(loaded=loaded))
        while True:
            command = self._commands.get()
            kind = command.WhichOneof("command")
            if kind == "shutdown":
                self._leave_group()
                return
            self._busy = True
            try:
                self._dispatch(command, str(kind))
            finally:
                self._busy = False

    def _dispatch(self, command: engine_pb2.EngineCommand, kind: str) -> None:
        try:
            if kind == "form_group":
                self._form(command.epoch, command.form_group)
            elif command.epoch != self._epoch:
                _log.info("dropped a command of epoch %d in epoch %d: %s", command.epoch, self._epoch, kind)
            elif kind == "abort_group":
                _log.info("epoch %d ends: %s", self._epoch, command.abort_group.reason)
                self._leave_group()
            elif self._groups is not None:
                self._role.execute(command)
        except GroupError as error:
            self._fail(str(error))
        except Exception as error:  # noqa: BLE001 - the main loop survives: the epoch ends, weights stay
            _log.exception("%s failed", kind)
            self._fail(f"{type(error).__name__} in {kind}")

    def _form(self, epoch: int, form: engine_pb2.FormGroup) -> None:
        self._leave_group()
        self._epoch = epoch
        self._groups = self._open_groups(epoch, form)
        self._role.join(self._groups, epoch)
        self._send(group_formed=engine_pb2.GroupFormed())
        _log.info("epoch %d: rank %d of %d", epoch, form.rank, form.world_size)

    def _open_groups(self, epoch: int, form: engine_pb2.FormGroup) -> RankGroups:
        mesh = Mesh.of(form.world_size, self._tp)
        if mesh.size == 1:
            return RankGroups.solo(self._role.bytes_posted)
        if form.rank == 0:
            store, address = open_store(self._host, FORM_TIMEOUT)
            self._send(store_ready=engine_pb2.StoreReady(address=address))
        else:
            store = connect_store(form.store_address, CONNECT_TIMEOUT)
        meet(store, epoch, form.rank, form.world_size, FORM_TIMEOUT, lambda: self._ended_epoch >= epoch)

        def form_one(store: Store, rank: int, size: int) -> SummingCommunicator:
            device, timeout = self._device, self._collective_timeout
            lanes = form_groups(store, epoch, rank, size, device, self._host, timeout)
            group = TorchCommunicator(lanes, device, self._role.bytes_posted)
            if device.type == "cpu" and self._role.exchanges_in_steps:
                return within_host(group, timeout.total_seconds())
            return group

        return form_rank_groups(mesh, form.rank, store, form_one)

    def _fail(self, reason: str) -> None:
        _log.warning("epoch %d failed: %s", self._epoch, reason)
        self._leave_group()
        self._send(group_failed=engine_pb2.GroupFailed(reason=reason))

    def _leave_group(self) -> None:
        if self._groups is not None:
            self._groups.close()
            self._groups = None
            self._role.reset()

    def _on_command(self, command: engine_pb2.EngineCommand) -> None:
        if command.HasField("abort_group"):
            self._ended_epoch = max(self._ended_epoch, command.epoch)
        elif command.HasField("shutdown"):
            self._ended_epoch = NEVER
        self._role.notice(command)
        if not command.HasField("hold_lease"):
            self._commands.put(command)

    def _beat(self) -> None:
        while True:
            self._send(
                heartbeat=engine_pb2.Heartbeat(
                    steps_done=self._role.steps_done,
                    busy=self._busy,
                    kv_blocks_used=self._role.kv_blocks_used,
                    kv_blocks_cached=self._role.kv_blocks_cached,
                    bytes_posted=dict(self._role.bytes_posted),
                    exposed_s=self._role.exposed_s,
                )
            )
            time.sleep(HEARTBEAT_S)

    def _report_load(self) -> Callable[[float], None]:
        reported = -1.0

        def progress(fraction: float) -> None:
            nonlocal reported
            if fraction - reported >= LOAD_REPORT_STEP or fraction >= 1:
                reported = fraction
                self._send(load_progress=engine_pb2.LoadProgress(fraction=fraction))

        return progress

    def _send(self, **event: object) -> None:
        self._link.send(engine_pb2.EngineEvent(epoch=self._epoch, **event))  # type: ignore[arg-type]
