"""What the leader of a prefill group exports to Prometheus beside what every rank does (docs/metrics.md)."""

from collections.abc import Iterable

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from sps2.v1 import cluster_pb2
from sps2_prefill_worker.coordinator import PrefillCoordinator
from sps2_prefill_worker.fetch_counts import FetchCounts, FetchResult
from sps2_service.metrics import LoopReader


def leader_metrics(coordinator: PrefillCoordinator) -> LoopReader:
    """Made, and read, on the coordinator's event loop."""

    async def read() -> Iterable[Metric]:
        load = cluster_pb2.WorkerLoad()
        coordinator.fill_load(load)
        return [*leader_families(load), *fetch_families(coordinator.fetches)]

    return LoopReader(read)


def leader_families(load: cluster_pb2.WorkerLoad) -> Iterable[Metric]:
    """Of what the leader tells the directory."""
    yield GaugeMetricFamily(
        "sps2_prefill_queued_tokens", "Prompt tokens that wait or are computed.", value=load.queued_tokens
    )
    yield CounterMetricFamily(
        "sps2_prefill_tokens",
        "Tokens of prompts begun that were not cached.",
        value=load.prompt_tokens - load.cached_tokens,
    )


def fetch_families(counts: FetchCounts) -> Iterable[Metric]:
    """Of what the group has fetched of others' caches."""
    fetches = CounterMetricFamily(
        "sps2_prefix_fetches", "Beginnings of prompts asked of other prefill groups.", labels=["result"]
    )
    for result in FetchResult:
        fetches.add_metric([result], counts.results[result])
    yield fetches
    yield CounterMetricFamily(
        "sps2_prefix_fetched_tokens", "Tokens whose KV has come from them.", value=counts.num_tokens
    )
    yield CounterMetricFamily("sps2_prefix_fetched_bytes", "Bytes of that KV.", value=counts.num_bytes)
