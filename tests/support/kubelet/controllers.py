"""Deployments and StatefulSets: they keep as many pods of their template as they should have, and roll it out."""

import copy
import hashlib
import json
import secrets
from collections.abc import Sequence
from typing import Protocol

from support.kubelet.environment import Object
from support.kubelet.pod import Pod
from support.kubelet.rollout import Count, amount, next_step

HASH = "pod-template-hash"
REVISION = "controller-revision-hash"
RESTARTED = "kubectl.kubernetes.io/restartedAt"


class Cluster(Protocol):
    """What a controller works on."""

    def start_pod(self, manifest: Object) -> Pod:
        """Begins the life of a pod."""
        ...


def template_hash(template: Object) -> str:
    """A short name of a template; another one, another name."""
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:10]


class Workload:
    """What both kinds have in common."""

    def __init__(self, manifest: Object, cluster: Cluster) -> None:
        self.manifest = copy.deepcopy(manifest)
        self.name: str = manifest["metadata"]["name"]
        self.made: list[Pod] = []
        """All pods that it ever made, oldest first."""
        self._cluster = cluster

    @property
    def replicas(self) -> int:
        """How many pods it should have."""
        return int(self.manifest["spec"]["replicas"])

    @property
    def pods(self) -> list[Pod]:
        """Those that are not gone."""
        return [pod for pod in self.made if not pod.gone]

    @property
    def settled(self) -> bool:
        """Whether all are there, ready and of the current template, and no other is left."""
        return len(self.pods) == self.replicas and all(pod.ready and self._current(pod) for pod in self.pods)

    def scale(self, replicas: int) -> None:
        """What `kubectl scale` does."""
        self.manifest["spec"]["replicas"] = replicas

    def restart(self, at: str) -> None:
        """What `kubectl rollout restart` does."""
        metadata = self.manifest["spec"]["template"]["metadata"]
        metadata.setdefault("annotations", {})[RESTARTED] = at

    def reconcile(self) -> None:
        """One look: makes and deletes what is due now."""
        raise NotImplementedError

    def _current(self, pod: Pod) -> bool:
        raise NotImplementedError

    def _make(self, name: str, labels: dict[str, str], **spec: str) -> None:
        template = copy.deepcopy(self.manifest["spec"]["template"])
        metadata = template["metadata"]
        metadata |= {"name": name, "namespace": self.manifest["metadata"]["namespace"]}
        metadata["labels"] |= labels
        template["spec"] |= spec
        self.made.append(self._cluster.start_pod(template))


class Deployment(Workload):
    """Pods of any name; old and new ones side by side."""

    def reconcile(self) -> None:
        """See the base."""
        present = [pod for pod in self.pods if not pod.leaving]
        new = [pod for pod in present if self._current(pod)]
        old = [pod for pod in present if not self._current(pod)]
        limits = self.manifest["spec"]["strategy"]["rollingUpdate"]
        step = next_step(
            self.replicas,
            amount(limits["maxSurge"], self.replicas, up=True),
            amount(limits["maxUnavailable"], self.replicas, up=False),
            *(Count(len(pods), sum(pod.ready for pod in pods)) for pods in (new, old)),
        )
        for _ in range(step.create):
            digest = self._hash()
            self._make(f"{self.name}-{digest}-{secrets.token_hex(3)[:5]}", {HASH: digest})
        # Of too many, those go first that are not ready, then the youngest.
        _delete(
            [pod for ready in (False, True) for pod in new[::-1] if pod.ready is ready][: step.delete_new]
        )
        _delete([pod for pod in old if not pod.ready][: step.delete_unready])
        _delete([pod for pod in old if pod.ready][: step.delete_ready])

    def _hash(self) -> str:
        return template_hash(self.manifest["spec"]["template"])

    def _current(self, pod: Pod) -> bool:
        return pod.labels[HASH] == self._hash()


class StatefulSet(Workload):
    """Pods NAME-0, NAME-1, ...; one takes the place of another only when that is gone."""

    def reconcile(self) -> None:
        """See the base."""
        present = {pod.name: pod for pod in self.pods}
        in_order = self.manifest["spec"].get("podManagementPolicy", "OrderedReady") == "OrderedReady"
        for index in range(self.replicas):
            pod = present.get(f"{self.name}-{index}")
            if pod is None:
                self._make_at(index)
            if in_order and (pod is None or not pod.ready):
                return
        surplus = [pod for index, pod in self._by_index(present) if index >= self.replicas]
        _delete([pod for pod in surplus if not pod.leaving])
        self._update([pod for index, pod in self._by_index(present) if index < self.replicas])

    def _update(self, pods: Sequence[Pod]) -> None:
        """From the last one to the first, each when those behind it are ready again."""
        for pod in reversed(pods if len(pods) == self.replicas else ()):
            if not self._current(pod):
                _delete([] if pod.leaving else [pod])
                return
            if not pod.ready:
                return

    def _by_index(self, present: dict[str, Pod]) -> list[tuple[int, Pod]]:
        return sorted((int(name.rpartition("-")[2]), pod) for name, pod in present.items())

    def _make_at(self, index: int) -> None:
        name = f"{self.name}-{index}"
        labels = {
            REVISION: self._hash(),
            "apps.kubernetes.io/pod-index": str(index),
            "statefulset.kubernetes.io/pod-name": name,
        }
        self._make(name, labels, subdomain=self.manifest["spec"]["serviceName"])

    def _hash(self) -> str:
        return template_hash(self.manifest["spec"]["template"])

    def _current(self, pod: Pod) -> bool:
        return pod.labels[REVISION] == self._hash()


KINDS: dict[str, type[Workload]] = {"Deployment": Deployment, "StatefulSet": StatefulSet}


def _delete(pods: Sequence[Pod]) -> None:
    for pod in pods:
        pod.delete()
