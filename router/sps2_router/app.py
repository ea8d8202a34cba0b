"""The router's parts, wired together; and its life: follow the directory, drain."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeAlias

import grpc
import structlog

from sps2.v1 import (
    cluster_service_pb2,
    inference_service_pb2,
    model_service_pb2,
    tokenizer_service_pb2,
)
from sps2_layout.profile_file import load_profile
from sps2_router.admission import Admission
from sps2_router.channels import LeaderChannels
from sps2_router.claims import Claims, RequestDirectory
from sps2_router.cluster_servicer import ClusterServicer
from sps2_router.config import RouterConfig
from sps2_router.dispatch import Dispatcher
from sps2_router.front_door import FrontDoor
from sps2_router.group_log import GroupLog
from sps2_router.line import Line
from sps2_router.live_requests import LiveRequests
from sps2_router.metrics import RouterMetrics, RouterState
from sps2_router.model_servicer import ModelServicer
from sps2_router.peers import Peers
from sps2_router.policies import POLICIES
from sps2_router.prefix_lookup import PrefixDirectory, find_held
from sps2_router.prompt_queue import PromptQueue
from sps2_router.scheduler import Scheduler
from sps2_router.servicer import InferenceServicer
from sps2_router.tenants import Tenants
from sps2_router.tokenizer import ModelTokenizer
from sps2_router.tokenizer_servicer import TokenizerServicer
from sps2_router.types import ServedModel
from sps2_service.bearer import BearerInterceptor, Tokens
from sps2_service.directory_client import Membership
from sps2_service.errors import Unavailable
from sps2_service.metrics import service_registry
from sps2_service.model_folder import ModelFolder
from sps2_service.server import ServerOptions, ServiceServer
from sps2_service.trace_context import TraceInterceptor
from sps2_service.tracing import Tracing

# How often health is looked at besides every change of the view: it also depends on time alone.
HEALTH_INTERVAL_S = 0.5

Interceptor: TypeAlias = "grpc.aio.ServerInterceptor[Any, Any]"

OPERATORS_ONLY = ("/sps2.v1.ClusterService/",)

log = structlog.get_logger(__name__)


class RouterServer(ServiceServer):
    """A server that is SERVING only while there are groups to serve with."""

    def __init__(self, config: RouterConfig, ready: Callable[[], bool]) -> None:
        """Raises LinesError."""
        super().__init__(
            tls=config.tls,
            peers=config.tls_peers,
            with_reflection=config.reflection,
            options=ServerOptions(max_connection_age_s=config.max_connection_age_s),
            interceptors=_interceptors(config),
        )
        self._ready = ready
        self._wanted = False
        self._said: bool | None = None

    async def set_serving(self, serving: bool) -> None:
        """Sets what health says when there are ready groups; without them it is NOT_SERVING."""
        self._wanted = serving
        await self.refresh()

    async def refresh(self) -> None:
        """Says what holds now, if that is news."""
        now = self._wanted and self._ready()
        if now != self._said:
            self._said = now
            await super().set_serving(now)


def _interceptors(config: RouterConfig) -> list[Interceptor]:
    traced: list[Interceptor] = [TraceInterceptor()] if config.trace_endpoint else []
    if config.auth_tokens is None:
        return traced
    return [BearerInterceptor(Tokens(config.auth_tokens), OPERATORS_ONLY), *traced]


class RouterDirectory(RequestDirectory, PrefixDirectory, Protocol):
    """What a router asks the directory beside its workers; `DirectoryClient` is one."""


class Router:
    """One router. Made inside a running event loop; `server` is to be run, with `follow` beside it."""

    def __init__(
        self,
        config: RouterConfig,
        model: ServedModel,
        tokenizer: ModelTokenizer,
        view: Membership,
        directory: RouterDirectory,
        tracing: Tracing | None = None,
    ) -> None:
        self._view = view
        self._address = config.advertise
        self._tokenizer = tokenizer
        tenants = Tenants(config.tenants)
        line = Line(tenants.weight)
        self._admission = Admission(config.max_live_requests, tenants)
        self._queue = PromptQueue(config.queue_limits, tenants, line)
        self._scheduler = Scheduler(
            view, POLICIES[config.policy](), model.model_hash, config.scheduler_limits, line
        )
        self._channels = LeaderChannels(self._live_addresses, config.tls)
        self._queue_limit_tokens = config.max_queued_tokens
        self.registry = service_registry("router")
        metrics = RouterMetrics(self.registry, self._state)
        dispatcher = Dispatcher(
            self._queue, self._scheduler, self._channels, tokenizer, config.retry_limits, metrics
        )
        ladder = load_profile(config.profile)
        self._claims = Claims(directory, lambda: self._address)
        peers = Peers(directory, self._channels, lambda: self._address)
        door = FrontDoor(
            model,
            tokenizer,
            self._admission,
            dispatcher,
            config.time_limits,
            ladder,
            self._claims,
            peers,
            partial(find_held, directory, view),
            metrics,
            tracing,
        )
        self.server = RouterServer(config, self._ready)
        for servicer, file, name in (
            (
                InferenceServicer(door, LiveRequests(self._admission, peers)),
                inference_service_pb2,
                "InferenceService",
            ),
            (ModelServicer(model), model_service_pb2, "ModelService"),
            (TokenizerServicer(model, tokenizer), tokenizer_service_pb2, "TokenizerService"),
            (
                ClusterServicer(view, self._admission, self._queue, self._scheduler, self._channels),
                cluster_service_pb2,
                "ClusterService",
            ),
        ):
            self.server.add(servicer, file.DESCRIPTOR.services_by_name[name])

    async def started(self, address: str) -> None:
        """Takes the address that it is bound to, unless it was told another one to be reached at."""
        self._address = self._address or address

    async def follow(self) -> None:
        """Keeps the view, the scheduler and health up to date, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._view.run())
            tasks.create_task(self._follow_changes())
            tasks.create_task(self._claims.run())

    async def _follow_changes(self) -> None:
        groups = GroupLog()
        while True:
            groups.note(self._view.workers.values())
            self._scheduler.wake()
            await self.server.refresh()
            try:
                async with asyncio.timeout(HEALTH_INTERVAL_S), self._view.changed:
                    await self._view.changed.wait()
            except TimeoutError:
                continue

    async def drain(self) -> None:
        """Takes nothing new, and returns when the last live request has ended."""
        self._admission.drain()
        await self.server.set_serving(False)
        log.info("finishing live requests", count=self._admission.num_live)
        await self._admission.wait_empty()

    async def close(self) -> None:
        """Closes what was opened; after the server has stopped."""
        await self._channels.close()
        self._tokenizer.close()

    def _state(self) -> RouterState:
        num_waiting = self._queue.num_waiting
        return RouterState(
            num_running=self._admission.num_live - num_waiting,
            num_waiting=num_waiting,
            waiting_tokens=self._queue.num_tokens,
            queue_limit_tokens=self._queue_limit_tokens,
            is_directory_away=not self._view.connected,
        )

    def _ready(self) -> bool:
        try:
            self._scheduler.check_ready()
        except Unavailable:
            return False
        return True

    def _live_addresses(self) -> list[str]:
        return [worker.grpc_address for worker in self._view.workers.values()]


def served_model(folder: ModelFolder, name: str, model_hash: str = "") -> ServedModel:
    """The model of a folder, under `name` and with `model_hash` or, where these are empty, the folder's own."""
    return ServedModel(
        name=name or folder.name,
        model_hash=model_hash or folder.model_hash,
        context_length=folder.context_length,
        vocabulary_size=folder.vocab_size,
        eos_token_ids=folder.eos_token_ids,
        keys_per_token=folder.keys_per_token,
    )
