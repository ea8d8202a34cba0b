"""`python -m sps2_decode_worker`: the supervisor of one decode rank."""

import asyncio
import sys
from dataclasses import dataclass

from sps2.internal.v1 import decode_service_pb2
from sps2.v1 import cluster_pb2
from sps2_decode_worker.coordinator import DecodeCoordinator
from sps2_decode_worker.metrics import LeaderMetrics
from sps2_decode_worker.servicer import DecodeServicer
from sps2_engine.runtime.options import EngineOptions
from sps2_service.config import load_config, setting
from sps2_service.directory_client import DirectoryClient
from sps2_service.ranks.leader_service import LeaderModel, LeaderService
from sps2_service.ranks.worker import run_worker
from sps2_service.ranks.worker_config import WorkerConfig
from sps2_service.run import prepare_process
from sps2_service.tracing import Tracing

_MODEL = "--model models/demo --directory 127.0.0.1:50060"
EXAMPLES = [
    f"--group decode-0 --rank 0 --group-size 2 {_MODEL}",
    f"--group decode-0 --rank 1 --group-size 2 {_MODEL} --leader 127.0.0.1:50080",
    f"--group decode-0 --rank 3 --group-size 4 --tp 2 {_MODEL} --leader 127.0.0.1:50080",
]


@dataclass(frozen=True, kw_only=True)
class DecodeWorkerConfig(WorkerConfig):
    """One rank of a decode group: a supervisor process that starts and watches its engine."""

    min_holder_tokens: int = setting(128, minimum=1)
    """A prompt's KV is spread over a further rank only while each would hold at least so many tokens."""
    debug_invariants: bool = False
    """Check KV blocks after every plan, on every rank, against the leader's count; what is wrong ends the epoch."""


def _engine_arguments(config: WorkerConfig, socket_fd: int, model_hash: str) -> list[str]:
    return EngineOptions(**config.engine_settings(model_hash)).arguments(socket_fd)


def _lead(
    config: WorkerConfig, directory: DirectoryClient, model: LeaderModel, tracing: Tracing | None
) -> LeaderService:
    assert isinstance(config, DecodeWorkerConfig)
    metrics = LeaderMetrics()
    coordinator = DecodeCoordinator(
        directory,
        model.model_hash,
        config.min_holder_tokens,
        tp=config.tp,
        debug_invariants=config.debug_invariants,
        metrics=metrics,
        tracing=tracing,
    )
    service = decode_service_pb2.DESCRIPTOR.services_by_name["DecodeService"]
    servicer = DecodeServicer(coordinator, model.vocabulary)
    return LeaderService(coordinator, servicer, service, metrics.collectors)


def main() -> int:
    config = load_config(DecodeWorkerConfig, prog="python -m sps2_decode_worker", examples=EXAMPLES)
    prepare_process(config.worker_id, config)
    role, engine = cluster_pb2.WORKER_ROLE_DECODE, "sps2_decode_worker.engine"
    return asyncio.run(run_worker(config, role, engine, _engine_arguments, _lead))


if __name__ == "__main__":
    sys.exit(main())
