"""What every rank exports to Prometheus (docs/metrics.md). Pure: from what its supervisor knows anyway.

What the engine counts comes with its heartbeats, twice a second, and begins at 0 in each of its lives: a counter that
falls is one that was reset.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from sps2.internal.v1 import engine_pb2
from sps2.v1 import cluster_pb2

KV_TRANSFER = "kv_transfer"
"""Kind of posted bytes that is no collective's."""


@dataclass(frozen=True)
class RankState:
    """One rank, as its supervisor sees it."""

    info: cluster_pb2.WorkerInfo
    """As the directory is told."""
    heartbeat: engine_pb2.Heartbeat
    """The engine's last one."""
    num_restarts: int
    """Engines that have ended unasked."""
    lease_age_s: float | None
    """Since the last heartbeat to the directory that was answered well; None before the first."""


def rank_families(state: RankState) -> Iterable[Metric]:
    """Those of any rank; of requests only the leader of a group knows."""
    info, heartbeat = state.info, state.heartbeat
    is_prefill = info.role == cluster_pb2.WORKER_ROLE_PREFILL
    yield from _kv_families(info, has_cache=is_prefill)
    posted = dict(heartbeat.bytes_posted)
    num_transferred = posted.pop(KV_TRANSFER, 0)
    if is_prefill:
        yield CounterMetricFamily(
            "sps2_kv_transfer_bytes", "KV that decode ranks have accepted.", value=num_transferred
        )
    collective = CounterMetricFamily(
        "sps2_collective_bytes", "Bytes posted to other ranks of the group.", labels=["kind"]
    )
    for kind, num_bytes in sorted(posted.items()):
        collective.add_metric([kind], num_bytes)
    yield collective
    yield CounterMetricFamily(
        "sps2_exposed_communication_seconds", "Waiting for exchanges of attention.", value=heartbeat.exposed_s
    )
    yield CounterMetricFamily(
        "sps2_engine_steps", "Steps of decode, or slices and layers of prefill.", value=heartbeat.steps_done
    )
    yield CounterMetricFamily(
        "sps2_engine_restarts", "Engines that have ended unasked.", value=state.num_restarts
    )
    yield GaugeMetricFamily("sps2_group_epoch", "Epoch that the rank is in.", value=info.epoch)
    if state.lease_age_s is not None:
        yield GaugeMetricFamily(
            "sps2_lease_age_seconds", "Since the lease was last renewed.", value=state.lease_age_s
        )
    if info.rank == 0:
        load = info.load
        yield GaugeMetricFamily(
            "sps2_num_requests_running", "Attempts being computed.", value=load.num_requests_running
        )
        yield GaugeMetricFamily(
            "sps2_num_requests_waiting", "Attempts that wait.", value=load.num_requests_waiting
        )


def _kv_families(info: cluster_pb2.WorkerInfo, *, has_cache: bool) -> Iterable[Metric]:
    total, load = info.capabilities.kv_blocks_total, info.load
    used, cached = load.kv_blocks_used, load.kv_blocks_cached
    yield GaugeMetricFamily(
        "sps2_kv_cache_usage_ratio", "KV blocks in use, of all.", value=used / total if total else 0.0
    )
    blocks = GaugeMetricFamily("sps2_kv_blocks", "KV blocks of 64 tokens.", labels=["state"])
    blocks.add_metric(["used"], used)
    if has_cache:
        blocks.add_metric(["cached"], cached)
    blocks.add_metric(["free"], total - used - cached)
    yield blocks
