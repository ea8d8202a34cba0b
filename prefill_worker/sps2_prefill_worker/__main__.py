"""`python -m sps2_prefill_worker`: the supervisor of one prefill rank."""

import asyncio
import sys
from dataclasses import dataclass
from typing import Literal

from sps2.internal.v1 import prefill_service_pb2
from sps2.v1 import cluster_pb2
from sps2_engine.runtime.options import EngineOptions
from sps2_prefill_worker.coordinator import PrefillCoordinator
from sps2_prefill_worker.fetch_costs import FetchChoice, FetchCosts
from sps2_prefill_worker.holders import GrpcHolders
from sps2_prefill_worker.metrics import leader_metrics
from sps2_prefill_worker.planning import Sharing
from sps2_prefill_worker.prefix_index import PrefixIndex
from sps2_prefill_worker.servicer import PrefillServicer
from sps2_service.config import load_config, setting
from sps2_service.directory_client import DirectoryClient
from sps2_service.ranks.leader_service import LeaderModel, LeaderService
from sps2_service.ranks.worker import run_worker
from sps2_service.ranks.worker_config import WorkerConfig
from sps2_service.run import prepare_process
from sps2_service.tracing import Tracing

_MODEL = "--model models/demo --directory 127.0.0.1:50060"
EXAMPLES = [
    f"--group prefill-0 --rank 0 --group-size 2 {_MODEL}",
    f"--group prefill-0 --rank 1 --group-size 2 {_MODEL} --leader 127.0.0.1:50070",
    f"--group prefill-0 --rank 3 --group-size 4 --tp 2 {_MODEL} --leader 127.0.0.1:50070",
]


@dataclass(frozen=True, kw_only=True)
class PrefillWorkerConfig(WorkerConfig):
    """One rank of a prefill group: a supervisor process that starts and watches its engine."""

    exchange: Literal["auto", "heads", "kv"] = "auto"
    """What travels between ranks: shares of all heads, or keys and values; auto: what is sooner. Rank 0 decides."""
    sharing: Sharing = "auto"
    """Prompts that all ranks of a group share: all, or auto: those that gain by it; each other one is one rank's.
    Rank 0 decides."""
    prefix_fetch: FetchChoice = "auto"
    """Beginnings of prompts whose KV another prefill group has cached, and that come from there: auto: those that
    come sooner than they are computed. Rank 0 decides."""
    prefix_fetch_gbps: float = setting(1.0, minimum=0.001)
    """Gigabytes per second at which KV is taken to come from another prefill group, all ranks together."""


def _engine_arguments(config: WorkerConfig, socket_fd: int, model_hash: str) -> list[str]:
    return EngineOptions(**config.engine_settings(model_hash)).arguments(socket_fd)


def _lead(
    config: WorkerConfig, directory: DirectoryClient, model: LeaderModel, tracing: Tracing | None
) -> LeaderService:
    assert isinstance(config, PrefillWorkerConfig)
    index = PrefixIndex(directory.prefixes)
    coordinator = PrefillCoordinator(
        config.exchange,
        config.threads,
        config.tp,
        config.sharing,
        index,
        FetchCosts(config.prefix_fetch, config.prefix_fetch_gbps * 1e9),
        GrpcHolders(config.tls),
        tracing,
    )
    service = prefill_service_pb2.DESCRIPTOR.services_by_name["PrefillService"]
    servicer = PrefillServicer(coordinator, model.vocabulary)
    return LeaderService(coordinator, servicer, service, [leader_metrics(coordinator)])


def main() -> int:
    config = load_config(PrefillWorkerConfig, prog="python -m sps2_prefill_worker", examples=EXAMPLES)
    prepare_process(config.worker_id, config)
    role, engine = cluster_pb2.WORKER_ROLE_PREFILL, "sps2_prefill_worker.engine"
    return asyncio.run(run_worker(config, role, engine, _engine_arguments, _lead))


if __name__ == "__main__":
    sys.exit(main())
