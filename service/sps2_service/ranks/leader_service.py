"""What a pool's leader adds to a rank's supervisor: its coordinator and its endpoint."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from google.protobuf.descriptor import ServiceDescriptor
from prometheus_client.registry import Collector

from sps2.v1 import cluster_pb2
from sps2_service.directory_client import DirectoryClient
from sps2_service.ranks.drain import DrainableWork
from sps2_service.ranks.group import Coordinator, GroupLeader
from sps2_service.ranks.worker_config import WorkerConfig
from sps2_service.request_fields import Vocabulary
from sps2_service.tracing import Tracing


class LeaderCoordinator(Coordinator, DrainableWork, Protocol):
    """The coordinator as its supervisor sees it."""

    def attach(self, leader: GroupLeader) -> None:
        """Names the group; before anything else."""
        ...

    def fill_load(self, load: cluster_pb2.WorkerLoad) -> None:
        """Adds requests running and waiting."""
        ...


@dataclass(frozen=True)
class LeaderService:
    """What rank 0 of a pool adds to a supervisor."""

    coordinator: LeaderCoordinator
    servicer: object
    descriptor: ServiceDescriptor
    collectors: Iterable[Collector]
    """What it exports to Prometheus beside what every rank does."""


@dataclass(frozen=True)
class LeaderModel:
    """What a leader knows of the model that its group serves."""

    model_hash: str
    vocabulary: Vocabulary


MakeLeaderService = Callable[[WorkerConfig, DirectoryClient, LeaderModel, Tracing | None], LeaderService]
