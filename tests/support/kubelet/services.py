"""Services: which pods are behind one, a forwarder at its cluster IP (kube-proxy's part), and its names."""

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial

from support.kubelet.dns import DOMAIN
from support.kubelet.environment import Object
from support.kubelet.pod import Pod

CHUNK = 256 * 1024
CONNECT_S = 5.0

Pods = Callable[[], Iterable[Pod]]
"""Those of the namespace."""


class Service:
    """A Service with a cluster IP, or a headless one."""

    def __init__(self, manifest: Object, ip: str, pods: Pods) -> None:
        """`ip` is empty for a headless one."""
        self.name: str = manifest["metadata"]["name"]
        self.ip = ip
        self._spec: Object = manifest["spec"]
        self._pods = pods

    def endpoints(self) -> list[Pod]:
        """The pods that it leads to now."""
        selector = self._spec["selector"].items()
        unready = self._spec.get("publishNotReadyAddresses", False)
        return [
            pod
            for pod in self._pods()
            if selector <= pod.labels.items() and pod.ip and not pod.gone and (pod.ready or unready)
        ]

    def addresses(self, host: str = "") -> Sequence[str]:
        """What its name leads to; with `host` that of one pod, by the host name that its StatefulSet gives it."""
        if host:
            return [pod.ip for pod in self.endpoints() if pod.name == host and self._governs(pod)]
        return [self.ip] if self.ip else [pod.ip for pod in self.endpoints()]

    def _governs(self, pod: Pod) -> bool:
        return pod.spec.get("subdomain") == self.name

    async def listen(self) -> list[asyncio.Server]:
        """Forwards each of its ports, if it has an address of its own."""
        if not self.ip:
            return []
        servers = []
        for port in self._spec["ports"]:
            forward = partial(self._forward, port["targetPort"])
            servers.append(await asyncio.start_server(forward, self.ip, port["port"], limit=CHUNK))
        return servers

    async def _forward(self, port: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, to the container port of that name of one of the pods."""
        if not (ready := self.endpoints()):
            writer.transport.abort()  # refused, as where no rule leads on
            return
        pod = random.choice(ready)
        try:
            async with asyncio.timeout(CONNECT_S):
                far_reader, far_writer = await asyncio.open_connection(pod.ip, pod.ports[port], limit=CHUNK)
        except OSError:  # TimeoutError is one
            writer.transport.abort()
            return
        await asyncio.gather(_copy(reader, far_writer), _copy(far_reader, writer))


def resolver(services: Sequence[Service], namespace: str) -> Callable[[str], Sequence[str] | None]:
    """The names of the cluster: SERVICE.NAMESPACE.svc.DOMAIN, and POD. before that."""
    by_name = {one.name: one for one in services}
    suffix = f".{namespace}.svc.{DOMAIN}"

    def resolve(name: str) -> Sequence[str] | None:
        if not name.endswith(suffix):
            return None
        host, _, service = name.removesuffix(suffix).rpartition(".")
        if service not in by_name:
            return None
        addresses = by_name[service].addresses(host)
        return addresses if addresses or not host else None

    return resolve


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One direction of a connection; its end is passed on as it came, a reset as a reset."""
    try:
        while data := await reader.read(CHUNK):
            writer.write(data)
            await writer.drain()
        with suppress(OSError):  # the other side has gone meanwhile
            writer.write_eof()
    except OSError:
        writer.transport.abort()
