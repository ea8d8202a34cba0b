"""GPUs of this machine for Prometheus, where NVML finds any (docs/metrics.md)."""

from collections.abc import Iterable
from contextlib import suppress
from types import ModuleType

import structlog
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

log = structlog.get_logger(__name__)


def register_devices(registry: CollectorRegistry) -> None:
    """Adds the GPUs that NVML shows this process; none where it is absent, or its driver."""
    try:
        import pynvml  # noqa: PLC0415 - of the workers' extra; nothing here needs it on a machine without GPUs
    except ImportError:
        return
    try:
        pynvml.nvmlInit()
        reader = DeviceReader(pynvml, pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError as error:
        log.debug("no GPUs are measured", why=str(error))
        return
    if reader.num_devices:
        registry.register(reader)


class DeviceReader(Collector):
    """Asks NVML, on the thread that scrapes."""

    def __init__(self, nvml: ModuleType, num_devices: int) -> None:
        """`nvml` is pynvml, initialised. Raises its NVMLError."""
        self._nvml = nvml
        self.num_devices = num_devices
        self._handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(num_devices)]

    def collect(self) -> Iterable[Metric]:
        """See `Collector.collect`; what a device does not tell is left out."""
        memory = GaugeMetricFamily(
            "sps2_device_memory_used_bytes", "Memory in use, by anybody.", labels=["device"]
        )
        utilization = GaugeMetricFamily(
            "sps2_device_utilization_ratio", "Of the last moment, with a kernel running.", labels=["device"]
        )
        for index, handle in enumerate(self._handles):
            with suppress(self._nvml.NVMLError):
                memory.add_metric([str(index)], self._nvml.nvmlDeviceGetMemoryInfo(handle).used)
            with suppress(self._nvml.NVMLError):
                rates = self._nvml.nvmlDeviceGetUtilizationRates(handle)
                utilization.add_metric([str(index)], rates.gpu / 100)
        return memory, utilization
