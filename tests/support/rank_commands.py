"""The command of a rendered container as its process will see it: variables expanded, flags parsed by the service."""

import atexit
import functools
import importlib.util
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sps2_decode_worker.__main__ import DecodeWorkerConfig
from sps2_kv_directory.config import DirectoryConfig
from sps2_prefill_worker.__main__ import PrefillWorkerConfig
from sps2_router.config import RouterConfig
from sps2_service.config import ServiceConfig, load_config
from support.chart import NAMESPACE, Object, Workload

CONFIGS: dict[str, type[ServiceConfig]] = {
    "sps2_router": RouterConfig,
    "sps2_kv_directory": DirectoryConfig,
    "sps2_prefill_worker": PrefillWorkerConfig,
    "sps2_decode_worker": DecodeWorkerConfig,
}
TLS_FOLDER = "/etc/sps2-tls"
REFERENCE = re.compile(r"\$\(([A-Za-z_][A-Za-z0-9_]*)\)")


@dataclass(frozen=True)
class Process:
    """One process of a running release."""

    pod: str
    """Name of its pod."""
    address: str
    """Under which others of its group find the pod, by name; its IP where nobody has to."""
    ip: str
    container: Object
    flags: tuple[str, ...]
    """Its arguments, variables expanded."""
    config: Any
    """What the service made of its flags."""

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.config.listen.rpartition(":")[2])

    @property
    def probe_port(self) -> int:
        """Where health answers in plaintext."""
        return int(self.config.health_port) if self.config.tls else self.port

    @property
    def metrics_ports(self) -> list[int]:
        """Where metrics are served: one port, or none."""
        return [int(self.config.metrics_port.rpartition(":")[2])] if self.config.metrics_port else []


def expand(text: str, variables: Mapping[str, str]) -> str:
    """`$(NAME)` as the kubelet replaces it; it leaves unknown names as they are, which is never meant here."""
    return REFERENCE.sub(lambda match: variables[match[1]], text)


def processes(workload: Workload) -> Iterator[Process]:
    """Every process of ours of a workload: two pods of a Deployment, two groups of a LeaderWorkerSet."""
    for number, (pod, address, fields, injected) in enumerate(_pods(workload)):
        ip = f"10.1.0.{number + 1}"
        for container in workload.services:
            variables = dict(injected)
            for entry in container.get("env", []):
                path = entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
                here = fields | {"status.podIP": ip, "metadata.name": pod}
                variables[entry["name"]] = here[path] if path else entry.get("value", "from elsewhere")
            flags = [expand(argument, variables) for argument in container["args"]]
            if any(mount["mountPath"] == TLS_FOLDER for mount in container["volumeMounts"]):
                flags = [flag.replace(f"={TLS_FOLDER}", f"={_tls_secret()}") for flag in flags]
            config = _parse(container["command"][2], tuple(flags), tuple(sorted(variables.items())))
            yield Process(pod, address, ip, container, tuple(flags), config)


@functools.lru_cache(maxsize=8192)  # every invariant asks again
def _parse(module: str, flags: tuple[str, ...], variables: tuple[tuple[str, str], ...]) -> Any:
    return load_config(CONFIGS[module], flags, dict(variables))


@functools.cache
def _tls_secret() -> str:
    """A folder with the files of the Secret, which flags must name; their content is for the service to read."""
    folder = tempfile.TemporaryDirectory(prefix="sps2-tls-")
    atexit.register(folder.cleanup)
    for name in ("tls.crt", "tls.key", "ca.crt"):
        Path(folder.name, name).touch()
    return folder.name


@functools.cache
def module_exists(module: str) -> bool:
    """Whether `python -m` finds the module."""
    return importlib.util.find_spec(f"{module}.__main__") is not None


def _pods(workload: Workload) -> Iterator[tuple[str, str, dict[str, str], dict[str, str]]]:
    """Name, address, downward fields and injected variables of each pod, as the controllers make them."""
    name, spec = workload.object["metadata"]["name"], workload.object["spec"]
    if workload.object["kind"] == "StatefulSet":
        for index in range(spec["replicas"]):
            pod = f"{name}-{index}"
            label = {"metadata.labels['apps.kubernetes.io/pod-index']": str(index)}
            yield pod, f"{pod}.{spec['serviceName']}", label, {}
    elif workload.object["kind"] == "LeaderWorkerSet":
        size = spec["leaderWorkerTemplate"]["size"]
        for group in range(2):
            leader = f"{name}-{group}.{name}.{NAMESPACE}"
            label = {"metadata.labels['leaderworkerset.sigs.k8s.io/group-index']": str(group)}
            for index in range(size):
                pod = f"{name}-{group}" + (f"-{index}" if index else "")
                injected = {
                    "LWS_LEADER_ADDRESS": leader,
                    "LWS_GROUP_SIZE": str(size),
                    "LWS_WORKER_INDEX": str(index),
                }
                yield pod, f"{pod}.{name}.{NAMESPACE}", label, injected
    else:
        for index in range(2):
            yield f"{name}-abc{index}", f"10.1.0.{index + 1}", {}, {}
