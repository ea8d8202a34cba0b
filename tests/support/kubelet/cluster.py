"""A release that runs: its objects, the loop that keeps them as they should be, and a handle for ordinary code.

The loop has a thread of its own; a drill's steps, which wait and call, use the `Release` from theirs.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from support.chart import NAMESPACE, Rendered
from support.kubelet.changes import Changes
from support.kubelet.commands import run
from support.kubelet.controllers import KINDS, Workload
from support.kubelet.dns import NameServer, resolv_conf
from support.kubelet.environment import Object
from support.kubelet.image import make_images
from support.kubelet.network import DNS_IP, Network
from support.kubelet.pod import Pod, Surroundings
from support.kubelet.services import Service, resolver

T = TypeVar("T")

START_S = 60.0
"""For the node: bridge, names, addresses."""
CALL_S = 30.0


class Release:
    """The objects of a rendered release on a node. Made on the loop; the methods below `call` are for other threads."""

    def __init__(self, rendered: Rendered, folder: Path) -> None:
        """`folder` is empty; logs of containers come to stay in `folder/logs`."""
        self._rendered, self._folder = rendered, folder
        self._changes = Changes()
        self._network = Network(folder / "pods")
        self._pods: list[Pod] = []
        self._loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        self._around = Surroundings(
            self._network,
            make_images(rendered.values, folder / "images"),
            _by_name(rendered.of("Secret")),
            _by_name(rendered.of("ConfigMap")),
            resolv_conf(DNS_IP, NAMESPACE),
            folder / "logs",
            self._changes,
        )
        self.workloads: dict[str, Workload] = {}

    async def run(self, started: Callable[[], None]) -> None:
        """Everything there is, until `end`."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            servers = await self._start()
            started()
            reconciling = tasks.create_task(self._reconcile())
            await self._end.wait()
            reconciling.cancel()
            for pod in self._pods:
                pod.delete()
            for server in servers:
                server.close()

    def start_pod(self, manifest: Object) -> Pod:
        """Begins the life of a pod."""
        pod = Pod(manifest, self._around)
        self._pods.append(pod)
        self._tasks.create_task(pod.run(), name=pod.name)
        return pod

    async def _start(self) -> list[asyncio.Server]:
        await self._network.start()
        services = [await self._service(one) for one in self._rendered.of("Service")]
        await self._loop.create_datagram_endpoint(
            lambda: NameServer(resolver(services, NAMESPACE)), local_addr=(DNS_IP, 53)
        )
        # The drill itself is a client in the cluster.
        path = self._folder / "resolv.conf"
        path.write_text(self._around.resolv_conf, encoding="utf-8")
        await run("mount", "--bind", str(path), "/etc/resolv.conf")
        for one in self._rendered.of(*KINDS):
            one["metadata"]["namespace"] = NAMESPACE
            self.workloads[one["metadata"]["name"]] = KINDS[one["kind"]](one, self)
        return [server for service in services for server in await service.listen()]

    async def _service(self, manifest: Object) -> Service:
        headless = manifest["spec"].get("clusterIP") == "None"
        ip = "" if headless else await self._network.service_address()
        return Service(manifest, ip, lambda: self._pods)

    async def _reconcile(self) -> None:
        while True:
            for workload in self.workloads.values():
                workload.reconcile()
            await self._changes.wait()

    # For other threads.

    def call(self, work: Coroutine[Any, Any, T], timeout: float = CALL_S) -> T:
        """Runs it on the loop and returns what it does."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)

    def do(self, work: Callable[[], T]) -> T:
        """The same for a plain function; whoever waits looks again after it."""

        async def on_loop() -> T:
            result = work()
            self._changes.tell()
            return result

        return self.call(on_loop())

    def wait_for(self, predicate: Callable[[], bool], timeout: float) -> None:
        """Returns when it holds; asked on the loop.

        Raises:
            TimeoutError: it does not hold after `timeout` seconds.
        """
        self.call(self._changes.until(predicate, timeout), timeout + CALL_S)

    def wait_settled(self, timeout: float, names: Sequence[str] = ()) -> None:
        """Returns when these workloads (all, if none are named) are as they should be, and nothing is left to do."""
        chosen = [self.workloads[name] for name in names] or list(self.workloads.values())
        try:
            self.wait_for(lambda: all(one.settled for one in chosen), timeout)
        except TimeoutError:
            raise TimeoutError(f"not settled in {timeout:g} s: {self.do(self.describe)}") from None

    def describe(self) -> str:
        """The pods that there are, for a message."""
        return ", ".join(
            f"{pod.name} {'leaving' if pod.leaving else 'ready' if pod.ready else 'not ready'}"
            f" {[(one.container, one.code) for one in pod.exits]}"
            for pod in self._pods
            if not pod.gone
        )

    def run_hook(self, manifest: Object) -> Pod:
        """Starts a pod of `helm test`."""
        manifest["metadata"]["namespace"] = NAMESPACE
        return self.do(lambda: self.start_pod(manifest))

    def end(self) -> None:
        """Deletes every pod; `run` returns when they are gone."""
        self._loop.call_soon_threadsafe(self._end.set)


@contextmanager
def release(rendered: Rendered, folder: Path) -> Iterator[Release]:
    """The release on its loop, until the end of the block; pods that then run end by SIGTERM, as on deletion.

    Raises:
        BaseException: what went wrong on the loop.
    """
    made: list[Release] = []
    failures: list[BaseException] = []
    started = threading.Event()

    async def main() -> None:
        made.append(Release(rendered, folder))
        await made[0].run(started.set)

    def live() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:  # noqa: BLE001 - it is raised in the thread that waits
            failures.append(error)
            started.set()

    thread = threading.Thread(target=live, name="node", daemon=True)
    thread.start()
    if not started.wait(START_S) or failures:
        raise RuntimeError("the node did not start") from (failures[0] if failures else None)
    try:
        yield made[0]
    finally:
        if thread.is_alive():
            made[0].end()
        thread.join()
        if failures:
            raise failures[0]


def _by_name(objects: Sequence[Object]) -> dict[str, Object]:
    return {one["metadata"]["name"]: one for one in objects}
