"""One rank's supervisor process: endpoint, lease, engine, and its place in the group. Shared by both workers."""

import asyncio
import sys
import time
import uuid
from collections.abc import Callable, Iterable

import structlog
from prometheus_client import Metric

from sps2.internal.v1 import engine_pb2, group_service_pb2
from sps2.v1 import cluster_pb2
from sps2_service.devices import register_devices
from sps2_service.directory_client import DirectoryClient
from sps2_service.metrics import LoopReader, service_registry
from sps2_service.model_folder import ModelFolder, ModelFolderError
from sps2_service.ranks.carried_renewals import CarriedRenewals
from sps2_service.ranks.drain import GroupDrain
from sps2_service.ranks.engine_process import EngineProcess, EngineWatch
from sps2_service.ranks.follower import Follower
from sps2_service.ranks.group import GroupLeader, GroupState, Member
from sps2_service.ranks.group_servicer import GroupServicer
from sps2_service.ranks.leader_service import LeaderCoordinator, LeaderModel, MakeLeaderService
from sps2_service.ranks.metrics import RankState, rank_families
from sps2_service.ranks.worker_config import WorkerConfig
from sps2_service.request_fields import Vocabulary
from sps2_service.run import ExpectedEndError, run_service
from sps2_service.server import server_for
from sps2_service.tracing import Tracing, open_tracing

DRAIN_MARGIN_S = 5.0
"""What leaving takes beside the drain budget, at most: routers are to learn of it, two leases are given back."""

POOLS = {cluster_pb2.WORKER_ROLE_PREFILL: "prefill", cluster_pb2.WORKER_ROLE_DECODE: "decode"}

log = structlog.get_logger(__name__)


EngineArguments = Callable[[WorkerConfig, int, str], list[str]]
"""From the configuration, a socket's descriptor and the model hash."""


class RankSupervisor:
    """Wires one rank together; `run` is its whole life."""

    def __init__(
        self,
        config: WorkerConfig,
        role: "cluster_pb2.WorkerRole.ValueType",
        engine_module: str,
        engine_arguments: EngineArguments,
        make_leader_service: MakeLeaderService,
        tracing: Tracing | None = None,
    ) -> None:
        """Made inside a running event loop. `tracing` is for a leader.

        Raises:
            ModelFolderError: in one line, what is wrong with the model folder.
        """
        self._config = config
        self._role = role
        self._folder = ModelFolder(config.model)
        self._model_hash = self._folder.model_hash
        self._model_name = config.model_name or self._folder.name
        self._incarnation = uuid.uuid4().hex
        self._server = server_for(config)
        self._metrics = service_registry(POOLS[role], group=config.group, rank=str(config.rank))
        self._metrics.register(LoopReader(self._read_metrics))
        register_devices(self._metrics)
        self._directory = DirectoryClient(config.directory, tls=config.tls)
        self._registration = self._directory.registration(self.worker_info, on_stale=self._on_stale)
        self._registration.on_fence = self._on_fence
        self._engine = EngineProcess(
            config.worker_id,
            engine_module,
            lambda fd: engine_arguments(config, fd, self._model_hash),
            self._on_event,
            self._on_lost,
            EngineWatch(stuck_s=config.engine_stuck_s),
        )
        self._loaded: engine_pb2.EngineLoaded | None = None
        self._load_fraction = 0.0
        self._address = config.listen
        self._draining = False
        self._leave = asyncio.Event()
        """Set when the group is to drain, or has drained, without a signal to this process."""
        self._stale = asyncio.Event()
        self._leader: GroupLeader | None = None
        self._coordinator: LeaderCoordinator | None = None
        self._member: Member | None = None
        self._follower: Follower | None = None
        if config.rank == 0:
            self._lead(make_leader_service, tracing)
        else:
            self._follow()

    async def run(self) -> int:
        """Serves until told to stop; the exit code."""
        try:
            return await run_service(
                self._server,
                self._config,
                self._metrics,
                on_started=self._on_started,
                background=self._background,
                drain=self._drain,
                ready_when_started=False,
                leave=self._leave,
                drain_margin_s=DRAIN_MARGIN_S,
            )
        finally:
            await self._directory.close()

    def worker_info(self) -> cluster_pb2.WorkerInfo:
        """This rank as the directory is to see it now."""
        config, loaded = self._config, self._loaded
        info = cluster_pb2.WorkerInfo(
            worker_id=config.worker_id,
            role=self._role,
            group=config.group,
            rank=config.rank,
            group_size=config.group_size,
            epoch=self._epoch,
            process_incarnation=self._incarnation,
            grpc_address=self._address,
            transfer_address=loaded.transfer_address if loaded else "",
            state=self._state,
        )
        info.capabilities.model_name = self._model_name
        info.capabilities.model_hash = self._model_hash
        info.capabilities.dtype = loaded.dtype if loaded else config.dtype
        info.capabilities.device = loaded.device if loaded else config.device
        info.capabilities.kv_blocks_total = loaded.kv_blocks_total if loaded else 0
        info.capabilities.tensor_ranks = config.tp
        heartbeat = self._engine.heartbeat
        info.load.steps_done = heartbeat.steps_done
        info.load.kv_blocks_used = heartbeat.kv_blocks_used
        info.load.kv_blocks_cached = heartbeat.kv_blocks_cached
        info.load.load_fraction = self._load_fraction
        for kind, count in heartbeat.bytes_posted.items():
            info.load.bytes_posted[kind] = count
        if self._coordinator is not None:
            self._coordinator.fill_load(info.load)
        return info

    async def _read_metrics(self) -> Iterable[Metric]:
        contact = self._registration.last_contact
        state = RankState(
            self.worker_info(),
            self._engine.heartbeat,
            self._engine.num_restarts,
            None if contact is None else time.monotonic() - contact,
        )
        return rank_families(state)

    def _lead(self, make_leader_service: MakeLeaderService, tracing: Tracing | None) -> None:
        config = self._config
        service = make_leader_service(config, self._directory, self._leader_model, tracing)
        leader = GroupLeader(
            config.group,
            config.group_size,
            lambda previous: self._directory.draw_epoch(config.group, previous),
            service.coordinator,
            self._on_state,
            lambda: self._registration.fence.holds(time.monotonic()),
            self._on_leave,
        )
        service.coordinator.attach(leader)
        self._leader, self._coordinator = leader, service.coordinator
        self._server.add(service.servicer, service.descriptor)
        for collector in service.collectors:
            self._metrics.register(collector)
        groups = group_service_pb2.DESCRIPTOR.services_by_name["GroupService"]
        renewals = CarriedRenewals()
        self._registration.collect = renewals.collect
        servicer = GroupServicer(leader, self._model_hash, config.tp, config.drain_s, renewals)
        self._server.add(servicer, groups)
        self._member = leader.join(0, self._engine.send)

    def _follow(self) -> None:
        config = self._config
        hello = group_service_pb2.FollowerHello(
            group=config.group,
            rank=config.rank,
            group_size=config.group_size,
            process_incarnation=self._incarnation,
            model_hash=self._model_hash,
            tensor_ranks=config.tp,
        )
        self._follower = Follower(
            hello,
            config.leader,
            config.worker_id,
            self._registration,
            lambda: self._on_leave("it has drained"),
            config.tls,
        )
        self._follower.attach(self._engine)

    @property
    def _leader_model(self) -> LeaderModel:
        return LeaderModel(self._model_hash, Vocabulary(self._model_name, self._folder.vocab_size))

    @property
    def _formed(self) -> bool:
        if self._leader is not None:
            return self._leader.state is GroupState.FORMED
        return self._follower is not None and self._follower.formed

    @property
    def _epoch(self) -> int:
        if self._leader is not None:
            return self._leader.epoch
        return self._follower.epoch if self._follower else 0

    @property
    def _state(self) -> "cluster_pb2.WorkerState.ValueType":
        if self._draining:
            return cluster_pb2.WORKER_STATE_DRAINING
        return cluster_pb2.WORKER_STATE_READY if self._formed else cluster_pb2.WORKER_STATE_STARTING

    async def _on_started(self, address: str) -> None:
        self._address = address

    async def _background(self) -> None:
        """Everything that runs as long as the supervisor does; the first to fail ends it.

        Raises:
            EngineStartError: the model folder is at fault.
            StaleWorkerError: another process has taken this worker's place.
        """
        parts = [self._engine.run(), self._registration.run(), self._end_when_stale()]
        if self._follower is not None:
            parts.append(self._follower.run())
        tasks = [asyncio.ensure_future(part) for part in parts]
        try:
            # The first to end, ends all; none of them ends by itself while all is well.
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _end_when_stale(self) -> None:
        await self._stale.wait()
        raise StaleWorkerError(f"another process serves as {self._config.worker_id}")

    def _on_stale(self) -> None:
        self._stale.set()

    def _on_fence(self, holds_until: float) -> None:
        """The engine has it in its own hands: it is fenced in time also when this process is stopped."""
        hold = engine_pb2.HoldLease(holds_until_s=holds_until)
        self._engine.send(engine_pb2.EngineCommand(hold_lease=hold))

    def _on_event(self, event: engine_pb2.EngineEvent) -> None:
        if event.HasField("load_progress"):
            self._load_fraction = event.load_progress.fraction
        elif event.HasField("loaded"):
            self._loaded, self._load_fraction = event.loaded, 1.0
            self._on_fence(self._registration.fence.holds_until)
            log.info(
                "engine loaded",
                device=event.loaded.device,
                dtype=event.loaded.dtype,
                kv_blocks=event.loaded.kv_blocks_total,
            )
        if self._leader is not None and self._member is not None:
            if not event.HasField("heartbeat"):
                self._leader.on_event(0, event, self._member)
        elif self._follower is not None:
            was = self._follower.formed
            self._follower.on_event(event)
            if was != self._follower.formed:
                self._on_state()

    def _on_lost(self, reason: str) -> None:
        self._loaded, self._load_fraction = None, 0.0
        if self._leader is not None and self._member is not None:
            self._leader.lose(0, reason, self._member)
        elif self._follower is not None:
            self._follower.on_lost(reason)
            self._on_state()

    def _on_state(self) -> None:
        """The group formed or broke: health and the directory are told at once."""
        self._registration.renew_now()
        self._health = asyncio.get_running_loop().create_task(
            self._server.set_serving(self._formed and not self._draining)
        )

    def _on_leave(self, why: str) -> None:
        if not self._leave.is_set():
            log.info("the group leaves", why=why)
        self._leave.set()

    async def _drain(self) -> None:
        """The leader drains the group and dismisses it; a follower stays until then."""
        self._draining = True
        await self._server.set_serving(False)
        self._registration.renew_now()
        if self._coordinator is not None:
            await GroupDrain(self._coordinator, self._config.drain_s).run()
        elif self._follower is not None:
            await self._follower.leave()
        await self._registration.end()
        await self._directory.deregister(self._config.worker_id, self._incarnation)
        if self._leader is not None:
            self._leader.dismiss()


class StaleWorkerError(ExpectedEndError):
    """Another process holds this worker's lease."""


async def run_worker(
    config: WorkerConfig,
    role: "cluster_pb2.WorkerRole.ValueType",
    engine_module: str,
    engine_arguments: EngineArguments,
    make_leader_service: MakeLeaderService,
) -> int:
    """Runs a rank's supervisor until it is told to stop; the exit code."""
    service = f"sps2-{cluster_pb2.WorkerRole.Name(role).removeprefix('WORKER_ROLE_').lower()}"
    endpoint = config.trace_endpoint if config.rank == 0 else ""  # the leader takes its ranks' spans
    async with open_tracing(service, config.worker_id, endpoint, config.trace_sample_ratio) as tracing:
        try:
            supervisor = RankSupervisor(
                config, role, engine_module, engine_arguments, make_leader_service, tracing
            )
        except ModelFolderError as error:
            sys.stderr.write(f"{error}\n")
            return 1
        return await supervisor.run()
