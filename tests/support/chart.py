"""The Helm chart, rendered by Helm's own engine, and its objects taken apart."""

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import helm_python
import yaml

CHART_DIR = Path(__file__).resolve().parents[2] / "helm" / "sps2"
RELEASE, NAMESPACE = "sps2", "serving"

Object: TypeAlias = dict[str, Any]
Values: TypeAlias = Mapping[str, Any]


@functools.cache
def chart() -> helm_python.Chart:
    """The chart, loaded once."""
    return helm_python.Chart.load(CHART_DIR)


@dataclass(frozen=True)
class Workload:
    """An object that makes pods, and their template."""

    object: Object
    template: Object
    """metadata and spec of the pods."""

    @property
    def name(self) -> str:
        """Kind and name, for messages."""
        return f"{self.object['kind']}/{self.object['metadata']['name']}"

    @property
    def labels(self) -> dict[str, str]:
        """Labels of the pods."""
        return dict(self.template["metadata"]["labels"])

    @property
    def component(self) -> str:
        """router, directory, prefill, decode, redis or test."""
        return self.labels["app.kubernetes.io/component"]

    @property
    def spec(self) -> Object:
        """Spec of the pods."""
        return dict(self.template["spec"])

    @property
    def containers(self) -> list[Object]:
        """The containers, without those that run before."""
        return list(self.spec["containers"])

    @property
    def services(self) -> list[Object]:
        """The containers that run a service of ours."""
        return [one for one in self.containers if one["command"][:2] == ["python", "-m"]]


@dataclass(frozen=True)
class Rendered:
    """One rendering."""

    values: dict[str, Any]
    """All values, defaults merged in."""
    objects: tuple[Object, ...]

    def of(self, *kinds: str) -> list[Object]:
        """The objects of some kinds."""
        return [one for one in self.objects if one["kind"] in kinds]

    def named(self, kind: str, name: str) -> Object:
        """The one object of that kind and name."""
        (found,) = [one for one in self.of(kind) if one["metadata"]["name"] == name]
        return found

    @property
    def workloads(self) -> list[Workload]:
        """Everything that makes pods."""
        return list(self._workloads())

    def part(self, component: str) -> list[Workload]:
        """The workloads of a component: one, but for a pool of StatefulSets."""
        return [one for one in self.workloads if one.component == component]

    def _workloads(self) -> Iterator[Workload]:
        for one in self.of("Deployment", "StatefulSet"):
            yield Workload(one, one["spec"]["template"])
        for one in self.of("LeaderWorkerSet"):
            yield Workload(one, one["spec"]["leaderWorkerTemplate"]["workerTemplate"])
        for one in self.of("Pod"):
            yield Workload(one, one)


def render(values: Values | None = None) -> Rendered:
    """All objects of a release, its test included.

    Raises:
        helm_python.HelmError: the values are refused; the message names which.
    """
    given = json.loads(json.dumps(values or {}))  # plain and unshared, as from a file
    texts = chart().render(given, name=RELEASE, namespace=NAMESPACE)
    objects = [
        one
        for path, text in texts.items()
        if path.endswith(".yaml")
        for one in yaml.load_all(text, Loader=yaml.CSafeLoader)
        if one is not None
    ]
    return Rendered(chart().merge_values(given), tuple(objects))


def example(name: str) -> Values:
    """One of the chart's example value files."""
    values: Values = yaml.safe_load((CHART_DIR / "examples" / f"{name}.yaml").read_text(encoding="utf-8"))
    return values
