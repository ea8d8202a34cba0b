"""The steps of the drill: what is done to a release that runs, and what came of it, for the tests to judge."""

from collections.abc import Callable
from typing import Any

from sps2_client import Client
from support.chart import Rendered
from support.kubelet.cluster import Release
from support.kubelet.controllers import Workload
from support.kubelet.environment import Object

SETTLE_S = 240.0
TEST_S = 120.0
PROMPT = "It was a dark night, and the rain fell in torrents"
NUM_TOKENS = 24


class Drill:
    """A release under drill."""

    def __init__(self, running: Release, rendered: Rendered) -> None:
        self.running, self.rendered = running, rendered
        self._num_seen = 0

    @property
    def address(self) -> str:
        """Of the router, as a client in the cluster names it."""
        (service,) = [one for one in self.rendered.of("Service") if one["metadata"]["name"] == "sps2-router"]
        return f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"

    def client(self, max_retries: int = 2) -> Client:
        """A client that resolves the Service by its name."""
        return Client(self.address, max_retries=max_retries)

    def workload(self, component: str) -> Workload:
        """The one workload of a component that has one."""
        return self.running.workloads[f"sps2-{component}"]

    def exits(self) -> Object:
        """Every end of a container so far: its code, whether it was told to, killed, and how long it took."""
        return {
            "exits": [
                {
                    "container": f"{one.pod}/{one.container}",
                    "code": one.code,
                    "asked": one.asked,
                    "killed": one.killed,
                    "stop_s": round(one.stop_s, 2),
                    "grace_s": pod.grace_s,
                }
                for workload in self.running.workloads.values()
                for pod in workload.made
                for one in pod.exits
            ]
        }


def start(drill: Drill) -> Object:
    """Waits until every probe of every container is content."""
    drill.running.wait_settled(SETTLE_S)
    pods = [pod for workload in drill.running.workloads.values() for pod in workload.pods]
    return {
        "pods": {pod.name: pod.ip for pod in pods},
        "starts": {f"{pod.name}/{one.name}": one.num_starts for pod in pods for one in pod.containers},
    }


def serve(drill: Drill) -> Object:
    """One completion."""
    with drill.client() as client:
        answer = client.generate(PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True, timeout=TEST_S)
    return {"prompt": PROMPT, "asked": NUM_TOKENS, "token_ids": list(answer.token_ids), "text": answer.text}


def helm_test(drill: Drill) -> Object:
    """What `helm test` does: the hook's pod, to its end."""
    (manifest,) = drill.rendered.of("Pod")
    pod = drill.running.run_hook(manifest)
    drill.running.wait_for(lambda: pod.gone, TEST_S)
    (ended,) = pod.exits
    return {"code": ended.code, "output": pod.containers[0].log_path().read_text(encoding="utf-8")}


STEPS: dict[str, Callable[[Drill], dict[str, Any]]] = {"start": start, "serve": serve, "helm-test": helm_test}
