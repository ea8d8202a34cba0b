"""Prometheus metrics as a scraper sees them, parsed by prometheus-client, and what each service declares."""

import asyncio
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.parser import text_string_to_metric_families

from sps2.internal.v1 import engine_pb2, kv_directory_service_pb2
from sps2.v1 import cluster_pb2
from sps2_decode_worker.metrics import LeaderMetrics
from sps2_kv_directory.membership import Membership
from sps2_kv_directory.metrics import DirectoryMetrics, stored_families, view_families
from sps2_kv_directory.watch import WatchHub
from sps2_prefill_worker.fetch_counts import FetchCounts
from sps2_prefill_worker.metrics import fetch_families, leader_families
from sps2_router.metrics import RouterMetrics, RouterState
from sps2_service.devices import DeviceReader
from sps2_service.metrics import service_registry
from sps2_service.ranks.metrics import RankState, rank_families

SCRAPE_TIMEOUT_S = 20.0
SERVICES = ("router", "directory", "prefill", "decode")


class Scrape:
    """One answer of an endpoint."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self.samples: dict[tuple[Any, ...], float] = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        """Of one series."""
        return self.samples[name, *sorted(labels.items())]

    def total(self, name: str) -> float:
        """Over all series of a name."""
        return sum(value for (found, *_), value in self.samples.items() if found == name)

    @property
    def series(self) -> set[tuple[Any, ...]]:
        """Every series of ours, and not of the process."""
        return {key for key in self.samples if str(key[0]).startswith("sps2_")}


def scrape(address: str) -> Scrape:
    """What is served at HOST:PORT."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=SCRAPE_TIMEOUT_S) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        return Scrape(answer.read().decode())


@dataclass(frozen=True)
class Declared:
    """One family, as docs/metrics.md has it."""

    kind: str
    labels: tuple[str, ...]


async def declared(service: str) -> dict[str, Declared]:
    """What a service exports, by the names of Prometheus; its registry is filled as the service fills it."""
    if service == "router":
        families: Iterable[Metric] = await of_router()
    elif service == "directory":
        families = await of_directory()
    else:
        families = of_rank(service)
    found: dict[str, Declared] = {}
    for family in families:
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        if not name.startswith("process_"):
            found[name] = Declared(family.type, tuple(sorted(labels)))
    return found


def one_call(metrics: RouterMetrics) -> None:
    """So that series which begin with their first call are there."""
    with metrics.call():
        pass


async def of_router() -> list[Metric]:
    """With the series of one call."""
    registry = service_registry("router")
    one_call(RouterMetrics(registry, lambda: RouterState(1, 1, 1, 1, is_directory_away=False)))
    return await asyncio.to_thread(lambda: list(registry.collect()))


async def of_directory() -> list[Metric]:
    """With the series of one failed call."""
    registry = service_registry("directory")
    metrics = DirectoryMetrics(
        registry, kv_directory_service_pb2.DESCRIPTOR.services_by_name["KvDirectoryService"]
    )
    metrics.failed("RenewLease", "INTERNAL")
    store: Any = FakeStore()
    hub = WatchHub(1)
    families = [*view_families(Membership(store, hub, poll_interval_s=1), hub, is_away=False)]
    return [*registry.collect(), *families, *await stored_families(store)]


class FakeStore:
    """As much of a store as is read."""

    async def state(self) -> Any:
        """Of an empty one."""
        return SimpleNamespace(num_requests=0, num_prefix_keys=0)


def of_rank(service: str) -> Iterable[Metric]:
    """Rank 0, on a machine with a GPU."""
    role = cluster_pb2.WORKER_ROLE_PREFILL if service == "prefill" else cluster_pb2.WORKER_ROLE_DECODE
    heartbeat = engine_pb2.Heartbeat(bytes_posted={"all_to_all": 1, "kv_transfer": 2})
    yield from service_registry(service, group="g", rank="0").collect()
    yield from rank_families(RankState(cluster_pb2.WorkerInfo(role=role), heartbeat, 0, 0.5))
    yield from DeviceReader(FakeNvml(), 1).collect()  # type: ignore[arg-type]
    if service == "prefill":
        yield from leader_families(cluster_pb2.WorkerLoad())
        yield from fetch_families(FetchCounts())
    else:
        registry = CollectorRegistry()
        for collector in LeaderMetrics().collectors:
            registry.register(collector)
        yield from registry.collect()


class FakeNvml:
    """As much of pynvml as is asked: one device, of which `rates_known` says whether its use is told."""

    class NVMLError(Exception):
        """What pynvml raises."""

    def __init__(self, *, rates_known: bool = True) -> None:
        self._rates_known = rates_known

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802 - pynvml's
        """The index itself."""
        return index

    def nvmlDeviceGetMemoryInfo(self, _: int) -> Any:  # noqa: N802
        """In bytes."""
        return SimpleNamespace(used=1 << 30)

    def nvmlDeviceGetUtilizationRates(self, _: int) -> Any:  # noqa: N802
        """In percent."""
        if not self._rates_known:
            raise self.NVMLError
        return SimpleNamespace(gpu=50)
