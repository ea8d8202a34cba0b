"""What the kubelet drill decides by itself: expansion of variables, rollouts, verdicts of probes, names, sizes."""

import base64
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from support.kubelet.controllers import KINDS, Workload
from support.kubelet.dns import NXDOMAIN, answer
from support.kubelet.environment import ManifestError, command_line, environment, expand, pod_fields
from support.kubelet.probes import Verdict
from support.kubelet.rollout import Count, Step, amount, next_step
from support.kubelet.volumes import num_bytes

FIELDS = pod_fields({"metadata": {"name": "web-0", "namespace": "llm", "labels": {"index": "0"}}}, "10.0.0.7")


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("--listen=$(IP):80", "--listen=1.2.3.4:80"),
        ("$(IP)$(IP)", "1.2.3.41.2.3.4"),
        ("$(UNKNOWN)", "$(UNKNOWN)"),
        ("$$(IP)", "$(IP)"),
        ("$IP costs 5$", "$IP costs 5$"),
    ],
)
def test_references_are_replaced_as_the_kubelet_does(text: str, expanded: str) -> None:
    assert expand(text, {"IP": "1.2.3.4"}) == expanded


def test_environment() -> None:
    secrets = {"redis": {"data": {"password": base64.b64encode(b"hunter2").decode()}}}
    manifest = {
        "command": ["serve"],
        "args": ["--name=$(NAME)", "--path=$(PATH)"],
        "env": [
            {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "PASSWORD", "valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}},
            {"name": "NAME", "value": "$(IP)/$(LATER)"},
            {"name": "LATER", "value": "x"},
        ],
    }
    variables = environment(manifest, FIELDS, secrets, {"PATH": "/bin"})
    assert variables == {
        "PATH": "/bin",
        "HOSTNAME": "web-0",
        "IP": "10.0.0.7",
        "PASSWORD": "hunter2",
        "NAME": "10.0.0.7/$(LATER)",
        "LATER": "x",
    }
    assert command_line(manifest, variables) == ["serve", "--name=10.0.0.7/$(LATER)", "--path=/bin"]
    absent = {"env": [{"name": "X", "valueFrom": {"secretKeyRef": {"name": "none", "key": "password"}}}]}
    with pytest.raises(ManifestError, match="none"):
        environment(absent, FIELDS, secrets, {})


@pytest.mark.parametrize(
    ("new", "old", "step"),
    [
        (Count(0, 0), Count(2, 2), Step(create=1)),
        (Count(1, 0), Count(2, 2), Step()),
        (Count(1, 1), Count(2, 2), Step(delete_ready=1)),
        (Count(1, 1), Count(1, 1), Step(create=1)),
        (Count(2, 2), Count(0, 0), Step()),
        (Count(3, 3), Count(0, 0), Step(delete_new=1)),
        (Count(0, 0), Count(2, 1), Step(create=1)),
        (Count(1, 1), Count(2, 1), Step(delete_unready=1)),
    ],
)
def test_rollout_keeps_all_replicas_ready(new: Count, old: Count, step: Step) -> None:
    assert next_step(2, 1, 0, new, old) == step


def test_rollout_without_surge_ends_a_pod_first() -> None:
    assert next_step(2, 0, 1, Count(0, 0), Count(2, 2)) == Step(delete_ready=1)
    assert next_step(2, 0, 1, Count(0, 0), Count(1, 1)) == Step(create=1)
    assert amount("25%", 3, up=True) == 1
    assert amount("25%", 3, up=False) == 0


def test_a_verdict_takes_answers_in_a_row() -> None:
    verdict = Verdict(successes=1, failures=2)
    seen = []
    for answered in (False, True, False, True, False, False, True):
        verdict.note(answered)
        seen.append(verdict.value)
    assert seen == [None, True, True, True, True, False, True]


def test_names() -> None:
    name = b"\3web\3llm\3svc\7cluster\5local\0"
    query = b"\x12\x34" + struct.pack("!HHHHH", 0x0100, 1, 0, 0, 0) + name
    services = {"web.llm.svc.cluster.local": ["10.0.0.1", "10.0.0.2"]}
    found = answer(query + struct.pack("!HH", 1, 1), services.get)
    assert found[:2] == b"\x12\x34"
    assert found[-4:] == bytes([10, 0, 0, 2])
    assert struct.unpack_from("!H", found, 6) == (2,)
    other_kind = answer(query + struct.pack("!HH", 28, 1), services.get)
    assert struct.unpack_from("!HHH", other_kind, 2) == (0x8580, 1, 0)
    absent = answer(query + struct.pack("!HH", 1, 1), lambda _: None)
    assert absent[3] & 0xF == NXDOMAIN


def test_sizes() -> None:
    assert [num_bytes(text) for text in ("64Mi", "1Gi", "100")] == [64 * 2**20, 2**30, 100]


@dataclass
class FakePod:
    """A pod as far as controllers look at it."""

    manifest: dict[str, Any]
    ready: bool = False
    leaving: bool = False
    gone: bool = False

    @property
    def name(self) -> str:
        return str(self.manifest["metadata"]["name"])

    @property
    def labels(self) -> dict[str, str]:
        return dict(self.manifest["metadata"]["labels"])

    def delete(self) -> None:
        self.leaving, self.ready = True, False


@dataclass
class FakeCluster:
    """Pods that change when a test says so."""

    pods: list[FakePod] = field(default_factory=list)

    def start_pod(self, manifest: dict[str, Any]) -> Any:
        self.pods.append(FakePod(manifest))
        return self.pods[-1]


def workload(kind: str, **spec: Any) -> tuple[Workload, FakeCluster]:
    cluster = FakeCluster()
    manifest = {
        "metadata": {"name": "web", "namespace": "llm"},
        "spec": {"replicas": 2, "template": {"metadata": {"labels": {"app": "web"}}, "spec": {}}, **spec},
    }
    return KINDS[kind](manifest, cluster), cluster


def roll(controller: Workload, cluster: FakeCluster) -> Iterator[list[str]]:
    """Has every pod that leaves go, and every other get ready, one look of the controller after the other."""
    while not controller.settled:
        controller.reconcile()
        yield [f"{pod.name}{'-' if pod.leaving else ''}" for pod in cluster.pods if not pod.gone]
        for pod in cluster.pods:
            pod.gone, pod.ready = pod.leaving, not pod.leaving


def test_a_stateful_set_rolls_from_its_last_pod_to_its_first() -> None:
    controller, cluster = workload("StatefulSet", podManagementPolicy="Parallel", serviceName="webs")
    assert list(roll(controller, cluster)) == [["web-0", "web-1"]]
    assert cluster.pods[1].manifest["spec"]["subdomain"] == "webs"
    assert cluster.pods[1].labels["apps.kubernetes.io/pod-index"] == "1"
    controller.restart("now")
    assert list(roll(controller, cluster)) == [
        ["web-0", "web-1-"],
        ["web-0", "web-1"],
        ["web-0-", "web-1"],
        ["web-1", "web-0"],
    ]


def test_a_stateful_set_in_order_waits_for_each_pod() -> None:
    controller, cluster = workload("StatefulSet", serviceName="webs")
    assert list(roll(controller, cluster)) == [["web-0"], ["web-0", "web-1"]]


def test_a_deployment_is_rolled_out_and_scaled() -> None:
    strategy = {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    controller, cluster = workload("Deployment", strategy=strategy)
    assert [len(pods) for pods in roll(controller, cluster)] == [2]
    old = {pod.name for pod in cluster.pods}
    controller.restart("now")
    for _ in roll(controller, cluster):
        assert sum(not pod.leaving for pod in controller.pods) >= 2
    assert old.isdisjoint(pod.name for pod in controller.pods)
    oldest = controller.pods[0].name
    controller.scale(1)
    assert len(list(roll(controller, cluster))) == 1
    assert [pod.name for pod in controller.pods] == [oldest]
