"""The metrics endpoint of a process, and state that is read on the event loop."""

import asyncio
import socket
import threading
import time
import urllib.error
from collections.abc import Iterable, Iterator

import pynvml
import pytest
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import GaugeMetricFamily

from sps2_service import metrics as module
from sps2_service.devices import DeviceReader
from sps2_service.metrics import LoopReader, MetricsEndpoint, service_registry
from sps2_service.server import CannotListenError
from support.metrics import FakeNvml, scrape


@pytest.fixture
def endpoint() -> Iterator[MetricsEndpoint]:
    made = MetricsEndpoint(service_registry("test", group="g"), "127.0.0.1:0")
    made.start()
    yield made
    made.stop()


def test_serves_a_registry_of_its_own(endpoint: MetricsEndpoint) -> None:
    seen = scrape(endpoint.address)
    (build,) = seen.families["sps2_build_info"].samples
    assert build.labels.keys() == {"version", "service", "group"}
    assert (build.value, build.labels["service"]) == (1, "test")
    assert seen.value("process_resident_memory_bytes") > 0
    assert not any(name.endswith("_created") for name, *_ in seen.series)


def test_a_silent_client_keeps_nobody_waiting(endpoint: MetricsEndpoint) -> None:
    host, _, port = endpoint.address.rpartition(":")
    with socket.create_connection((host, int(port)), 5):
        assert scrape(endpoint.address).series


def test_the_port_is_free_after_the_stop(endpoint: MetricsEndpoint) -> None:
    endpoint.stop()
    endpoint.stop()
    again = MetricsEndpoint(CollectorRegistry(), endpoint.address)
    again.start()
    again.stop()


@pytest.mark.parametrize("listen", ["127.0.0.1:99999", "192.0.2.1:0", "no such host:0"])
def test_an_address_that_cannot_be_bound(listen: str) -> None:
    with pytest.raises(CannotListenError, match=f"cannot listen on {listen} .--metrics-port"):
        MetricsEndpoint(CollectorRegistry(), listen).start()


def test_a_port_that_is_taken(endpoint: MetricsEndpoint) -> None:
    with pytest.raises(CannotListenError, match="is it in use"):
        MetricsEndpoint(CollectorRegistry(), endpoint.address).start()


def test_without_an_address_nothing_is_served() -> None:
    silent = MetricsEndpoint(CollectorRegistry(), "")
    silent.start()
    assert silent.address == ""
    silent.stop()


async def test_state_is_read_on_the_event_loop() -> None:
    readers: list[threading.Thread] = []

    async def read() -> Iterable[Metric]:
        readers.append(threading.current_thread())
        return [GaugeMetricFamily("sps2_depth", "Depth.", value=7)]

    registry = CollectorRegistry()
    registry.register(LoopReader(read))
    endpoint = MetricsEndpoint(registry, "127.0.0.1:0")
    endpoint.start()
    try:
        seen = await asyncio.to_thread(scrape, endpoint.address)
    finally:
        await asyncio.to_thread(endpoint.stop)
    assert (seen.value("sps2_depth"), readers) == (7, [threading.current_thread()])


async def test_a_loop_that_stands_still_fails_the_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOP_TIMEOUT_S", 0.05)

    async def read() -> Iterable[Metric]:
        return []

    registry = CollectorRegistry()
    registry.register(LoopReader(read))
    asking = asyncio.get_running_loop().run_in_executor(None, lambda: list(registry.collect()))
    time.sleep(0.2)  # noqa: ASYNC251 - it stands still
    with pytest.raises(TimeoutError):
        await asking


def test_a_failed_scrape_is_a_status() -> None:
    class Failing:
        def collect(self) -> Iterable[Metric]:
            raise TimeoutError

    registry = CollectorRegistry()
    registry.register(Failing())
    endpoint = MetricsEndpoint(registry, "127.0.0.1:0")
    endpoint.start()
    try:
        with pytest.raises(urllib.error.HTTPError) as caught:
            scrape(endpoint.address)
    finally:
        endpoint.stop()
    assert caught.value.code == 503


@pytest.mark.parametrize("rates_known", [True, False])
def test_devices(rates_known: bool) -> None:
    registry = CollectorRegistry()
    registry.register(DeviceReader(FakeNvml(rates_known=rates_known), 2))  # type: ignore[arg-type]
    assert registry.get_sample_value("sps2_device_memory_used_bytes", {"device": "1"}) == 1 << 30
    expected = 0.5 if rates_known else None
    assert registry.get_sample_value("sps2_device_utilization_ratio", {"device": "0"}) == expected


def test_the_stand_in_for_nvml_has_what_nvml_has() -> None:
    asked = {name for name in vars(FakeNvml) if not name.startswith("_")}
    assert asked | {"nvmlInit", "nvmlDeviceGetCount"} <= set(dir(pynvml))
