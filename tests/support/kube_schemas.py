"""Objects against the schemas of Kubernetes (`kubernetes-validate`'s) and of custom resources (tests/data/crds)."""

import functools
import json
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from support.chart import Object

CRD_DIR = Path(__file__).resolve().parents[1] / "data" / "crds"
OLDEST, NEWEST = "1.30.0", "1.37.0"
"""The oldest Kubernetes that the chart allows, and the newest there are schemas of."""


def errors(one: Object, version: str) -> list[str]:
    """What is wrong with an object: a path and a sentence each. Unknown fields are wrong."""
    return list(_errors(json.dumps(one, sort_keys=True), version))


@functools.lru_cache(maxsize=8192)  # most objects are the same in most renderings
def _errors(text: str, version: str) -> tuple[str, ...]:
    one = json.loads(text)
    crd = CRD_DIR / f"{one['kind'].lower()}.yaml"
    if not crd.exists():
        group = one["apiVersion"].replace(".k8s.io", "").replace("/", "-")
        return tuple(_problems(_kubernetes(f"{one['kind'].lower()}-{group}", version), one))
    schema = yaml.safe_load(crd.read_text(encoding="utf-8"))
    found = _problems(Draft202012Validator(schema), one)
    for template in _pod_templates(schema, one):
        found += _problems(_kubernetes("podtemplatespec-v1", version), template)
    return tuple(found)


def _problems(validator: Any, one: Object) -> list[str]:
    return [
        f"{'/'.join(map(str, error.path))}: {error.message[:200]}" for error in validator.iter_errors(one)
    ]


def _pod_templates(schema: Any, one: Any) -> list[Object]:
    if not isinstance(one, dict):
        return []
    if schema.get("podTemplate"):
        return [one]
    inner = schema.get("properties", {})
    return [
        found for key, value in one.items() if key in inner for found in _pod_templates(inner[key], value)
    ]


@functools.cache
def _kubernetes(name: str, version: str) -> Any:
    schema = _load(f"{name}.json", version)
    return Draft202012Validator(
        schema, registry=_definitions(version).with_resource("", Resource.from_contents(schema))
    )


@functools.cache
def _definitions(version: str) -> Any:
    definitions: Resource[Any] = Resource.from_contents(_load("_definitions.json", version))
    return definitions @ Registry()


def _load(name: str, version: str) -> Any:
    folder = resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}-local-strict"
    return json.loads((folder / name).read_text(encoding="utf-8"))
