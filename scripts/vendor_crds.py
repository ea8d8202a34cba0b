"""Writes tests/data/crds from released packages: schemas of other projects' custom resources, without descriptions.

    python scripts/vendor_crds.py            # needs the package index; run it to take a newer release over

cloudcoil publishes each project's CRDs as pydantic models, generated from the files of a release, with all fields,
bounds, patterns and choices. A virtual environment of its own has them while this runs; the project never imports them.
What the API server does not know it refuses, so objects are closed here. `metadata` is Kubernetes' own and left open.
"""

import json
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

TARGET = Path(__file__).resolve().parent.parent / "tests" / "data" / "crds"
# Prints a model's JSON Schema.
DUMP = """
import importlib, json, sys
module, name = sys.argv[1:]
print(json.dumps(getattr(importlib.import_module(module), name).model_json_schema(by_alias=True)))
"""


@dataclass(frozen=True)
class Source:
    """A custom resource, and where its schema comes from."""

    kind: str
    api_version: str
    package: str
    version: str
    """The project's own, and the package's number behind it."""
    module: str
    project: str

    @property
    def header(self) -> str:
        """Says in the file where it is from."""
        release = self.version.rpartition(".")[0]
        return (
            f"# {self.kind} of {self.project} {release} (Apache-2.0).\n"
            f"# Written by scripts/vendor_crds.py from {self.package} {self.version} of PyPI (Apache-2.0).\n"
        )


KEDA = ("cloudcoil.models.keda", "2.16.1.0", "cloudcoil.models.keda.v1alpha1", "kedacore/keda")
OPERATOR = (
    "cloudcoil.models.prometheus_operator",
    "0.80.1.0",
    "cloudcoil.models.prometheus_operator.v1",
    "prometheus-operator/prometheus-operator",
)
SOURCES = (
    Source("ScaledObject", "keda.sh/v1alpha1", *KEDA),
    Source("PodMonitor", "monitoring.coreos.com/v1", *OPERATOR),
    Source("PrometheusRule", "monitoring.coreos.com/v1", *OPERATOR),
)


def schema_of(source: Source, model: dict[str, Any]) -> dict[str, Any]:
    """The schema of a resource as users write it, from that of its model."""
    definitions = model["$defs"]
    spec = _plain(model["properties"]["spec"])
    used: dict[str, Any] = {}
    todo = _references(spec)
    while todo:
        name = todo.pop()
        if name not in used:
            used[name] = _plain(definitions[name])
            todo += _references(used[name])
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "properties": {
            "apiVersion": {"const": source.api_version},
            "kind": {"const": source.kind},
            "metadata": {"type": "object"},
            "spec": spec,
        },
        "$defs": dict(sorted(used.items())),
    }


def _plain(node: Any) -> Any:
    """A schema without titles and defaults; what may be null in Python is left out in YAML; objects are closed."""
    if isinstance(node, list):
        return [_plain(one) for one in node]
    if not isinstance(node, dict):
        return node
    given = {key: value for key, value in node.items() if key not in {"title", "default", "description"}}
    if "anyOf" in given:
        choices = [one for one in given["anyOf"] if one != {"type": "null"}]
        if len(choices) == 1:
            return _plain(given | {"anyOf": []} | choices[0])
        given["anyOf"] = choices
    given = {key: value for key, value in given.items() if value != []}
    if "properties" in given:
        properties = {name: _plain(one) for name, one in given.pop("properties").items()}
        return {"additionalProperties": False, **given, "properties": properties}
    return {key: _plain(value) for key, value in given.items()}


def _references(node: Any) -> list[str]:
    if isinstance(node, list):
        return [name for one in node for name in _references(one)]
    if not isinstance(node, dict):
        return []
    here = [node["$ref"].removeprefix("#/$defs/")] if isinstance(node.get("$ref"), str) else []
    return here + [name for one in node.values() for name in _references(one)]


def main() -> int:
    """Installs the packages aside and writes the files."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / "bin" / "python")
        pins = sorted({f"{one.package}=={one.version}" for one in SOURCES})
        subprocess.run([python, "-m", "pip", "install", "-q", *pins], check=True, timeout=280)
        for source in SOURCES:
            dump = [python, "-c", DUMP, source.module, source.kind]
            text = subprocess.run(dump, check=True, capture_output=True, text=True, timeout=100).stdout
            schema = yaml.safe_dump(schema_of(source, json.loads(text)), sort_keys=False, width=110)
            (TARGET / f"{source.kind.lower()}.yaml").write_text(source.header + schema, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
