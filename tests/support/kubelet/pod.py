"""A pod's life on the node: sandbox, volumes, containers with their probes, and its end within the grace period."""

import asyncio
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from support.kubelet.changes import Changes
from support.kubelet.commands import run
from support.kubelet.container import BACK_OFF_S, Container, Exit, Recipe
from support.kubelet.environment import ManifestError, Object, command_line, environment, pod_fields
from support.kubelet.image import Image
from support.kubelet.network import Network, Sandbox
from support.kubelet.probes import verdicts
from support.kubelet.volumes import make_volumes, remove_volumes

SHM_BYTES = 64 * 2**20
"""Of /dev/shm where no volume is mounted there."""


@dataclass(frozen=True)
class Surroundings:
    """What pods take from their namespace and node."""

    network: Network
    images: Mapping[str, Image]
    """By repository."""
    secrets: Mapping[str, Object]
    config_maps: Mapping[str, Object]
    resolv_conf: str
    logs: Path
    changes: Changes


class Pod:
    """One pod. `run` is its life; all else looks at it from outside."""

    def __init__(self, manifest: Object, around: Surroundings) -> None:
        """`manifest` has metadata (name, namespace, labels) and spec."""
        self.manifest = manifest
        self.name: str = manifest["metadata"]["name"]
        self.labels: dict[str, str] = manifest["metadata"]["labels"]
        self.spec: Object = manifest["spec"]
        self.ip = ""
        self.containers: list[Container] = []
        self.leaving = False
        """It has been deleted; what runs in it is being stopped."""
        self.gone = False
        self._around = around
        self._ready: set[str] = set()

    @property
    def ready(self) -> bool:
        """Every container is; never again once the pod is leaving."""
        return not self.leaving and bool(self.containers) and len(self._ready) == len(self.containers)

    @property
    def grace_s(self) -> float:
        """Seconds between its deletion and SIGKILL."""
        return float(self.spec.get("terminationGracePeriodSeconds", 30))

    @property
    def exits(self) -> list[Exit]:
        """Ends of its containers' processes."""
        return [one for container in self.containers for one in container.exits]

    @property
    def ports(self) -> dict[str, int]:
        """Its container ports by name."""
        return {
            port["name"]: port["containerPort"]
            for container in self.spec["containers"]
            for port in container.get("ports", [])
        }

    def delete(self) -> None:
        """The beginning of its end."""
        self.leaving = True
        self._around.changes.tell()

    async def run(self) -> None:
        """From the sandbox to its removal; returns when nothing of the pod is left."""
        sandbox = await self._around.network.sandbox(self.name)
        volumes = await self._prepare(sandbox)
        self.ip = sandbox.ip
        self.containers = [self._container(one, sandbox, volumes) for one in self.spec["containers"]]
        async with asyncio.TaskGroup() as tasks:
            lives = [tasks.create_task(self._live(one)) for one in self.containers]
            while not self.leaving and not all(life.done() for life in lives):
                await self._around.changes.wait()
            async with asyncio.TaskGroup() as stopping:
                for one in self.containers:
                    stopping.create_task(one.stop(self.grace_s))
            for life in lives:
                life.cancel()
        await self._remove(sandbox)

    async def _prepare(self, sandbox: Sandbox) -> dict[str, Path]:
        folder, around = sandbox.folder, self._around
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{sandbox.ip} {self.name}\n", encoding="utf-8")
        (folder / "resolv.conf").write_text(around.resolv_conf, encoding="utf-8")
        (folder / "shm").mkdir()
        await run("mount", "-t", "tmpfs", "-o", f"size={SHM_BYTES}", "tmpfs", str(folder / "shm"))
        if "initContainers" in self.spec:
            raise ManifestError("initContainers: not known here")
        return await make_volumes(self.manifest, folder, around.secrets, around.config_maps)

    async def _remove(self, sandbox: Sandbox) -> None:
        await remove_volumes(self.manifest, sandbox.folder)
        await run("umount", str(sandbox.folder / "shm"))
        await self._around.network.remove(sandbox)
        self.gone = True
        self._around.changes.tell()

    def _container(self, manifest: Object, sandbox: Sandbox, volumes: Mapping[str, Path]) -> Container:
        image = self._around.images[manifest["image"].rpartition(":")[0]]
        variables = environment(
            manifest, pod_fields(self.manifest, sandbox.ip), self._around.secrets, image.env
        )
        recipe = Recipe(
            name=manifest["name"],
            manifest=manifest,
            security={**self.spec["securityContext"], **manifest["securityContext"]},
            image=image,
            command=command_line(manifest, variables),
            env=variables,
            volumes=volumes,
            sandbox=sandbox,
        )
        logs = self._around.logs / sandbox.folder.name
        logs.mkdir(exist_ok=True, parents=True)
        return Container(self.name, recipe, logs, self._around.changes)

    async def _live(self, container: Container) -> None:
        """Process after process, each under its probes."""
        while True:
            async with asyncio.TaskGroup() as tasks:
                probing = tasks.create_task(self._probe(container))
                await container.run()
                probing.cancel()
            self._note(container, ready=False)
            if self.leaving or self.spec.get("restartPolicy", "Always") == "Never":
                return
            await asyncio.sleep(BACK_OFF_S)

    async def _probe(self, container: Container) -> None:
        startup = container.manifest.get("startupProbe")
        if startup is not None and not await self._first_verdict(startup):
            await container.stop(self.grace_s)
            return
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._readiness(container))
            if (liveness := container.manifest.get("livenessProbe")) is not None:
                tasks.create_task(self._liveness(container, liveness))

    async def _first_verdict(self, probe: Object) -> bool:
        async with aclosing(verdicts(probe, self.ip, self.ports)) as found:
            return await anext(found)

    async def _readiness(self, container: Container) -> None:
        probe = container.manifest.get("readinessProbe")
        if probe is None:
            self._note(container, ready=True)
            return
        async with aclosing(verdicts(probe, self.ip, self.ports)) as found:
            async for verdict in found:
                self._note(container, ready=verdict)

    async def _liveness(self, container: Container, probe: Object) -> None:
        async with aclosing(verdicts(probe, self.ip, self.ports)) as found:
            async for verdict in found:
                if not verdict and not self.leaving:  # the kubelet asks no pod that ends whether it lives
                    await container.stop(self.grace_s)

    def _note(self, container: Container, *, ready: bool) -> None:
        if ready != (container.name in self._ready):
            (self._ready.add if ready else self._ready.discard)(container.name)
            self._around.changes.tell()
