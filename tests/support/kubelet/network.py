"""The node's network: a bridge, and for each pod a sandbox (network, IPC and host name) that is linked to it.

Knows nothing of Services and names.
"""

import asyncio
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from support.kubelet.commands import run

BRIDGE = "br0"
NODE_IP = "10.244.0.1"
DNS_IP = "10.96.0.10"
PODS, SERVICES = "10.244.0.", "10.96.1."
# Kubernetes' pause container: it holds the namespaces of a pod while containers come and go.
PAUSE = "hostname {name} && ip link set lo up && echo ready && exec sleep infinity"


@dataclass(frozen=True)
class Sandbox:
    """What the containers of a pod share."""

    ip: str
    folder: Path
    """Of the pod on the node: volumes, files that the kubelet writes, /sys as this network has it."""
    pause: asyncio.subprocess.Process

    @property
    def enter(self) -> tuple[str, ...]:
        """What a command is prefixed with to run in it."""
        return ("nsenter", "--target", str(self.pause.pid), "--net", "--ipc", "--uts")


class Network:
    """Addresses, and the links behind them."""

    def __init__(self, folder: Path) -> None:
        """`folder` gets a folder for each pod."""
        self._folder = folder
        self._pods, self._services = count(2), count(1)

    async def start(self) -> None:
        """Makes the bridge."""
        lines = (
            "link set lo up",
            f"link add {BRIDGE} type bridge",
            f"addr add {NODE_IP}/16 dev {BRIDGE}",
            f"addr add {DNS_IP}/32 dev {BRIDGE}",
            f"link set {BRIDGE} up",
        )
        await run("ip", "-batch", "-", stdin="\n".join(lines))

    async def service_address(self) -> str:
        """A new cluster IP: one more address of the node, which pods reach by their default route."""
        address = f"{SERVICES}{next(self._services)}"
        await run("ip", "addr", "add", f"{address}/32", "dev", BRIDGE)
        return address

    async def sandbox(self, pod: str) -> Sandbox:
        """The namespaces of a new pod, with an address of its own."""
        number = next(self._pods)
        folder = self._folder / f"{pod}.{number}"  # a StatefulSet's next pod has the same name
        (folder / "sys").mkdir(parents=True)
        pause = await asyncio.create_subprocess_exec(
            *("unshare", "--net", "--ipc", "--uts", "sh", "-c", PAUSE.format(name=pod)),
            stdout=asyncio.subprocess.PIPE,
        )
        sandbox = Sandbox(f"{PODS}{number}", folder, pause)
        assert pause.stdout is not None
        if await pause.stdout.readline() != b"ready\n":
            raise RuntimeError(f"the sandbox of {pod} did not start")
        await self._link(sandbox, f"veth{number}")
        await run(*sandbox.enter, "mount", "-t", "sysfs", "-o", "ro", "sysfs", str(folder / "sys"))
        return sandbox

    async def remove(self, sandbox: Sandbox) -> None:
        """Ends the namespaces, and with them every link and connection."""
        await run("umount", str(sandbox.folder / "sys"))
        sandbox.pause.kill()
        await sandbox.pause.wait()

    async def _link(self, sandbox: Sandbox, name: str) -> None:
        lines = (
            f"link add {name} type veth peer name eth0 netns {sandbox.pause.pid}",
            f"link set {name} master {BRIDGE} up",
        )
        await run("ip", "-batch", "-", stdin="\n".join(lines))
        inside = (
            f"addr add {sandbox.ip}/16 dev eth0",
            "link set eth0 up",
            f"route add default via {NODE_IP}",
        )
        await run(*sandbox.enter, "ip", "-batch", "-", stdin="\n".join(inside))
