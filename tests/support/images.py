"""What the images hold: their distributions, by what `docker/*.Dockerfile` installs, and processes with no others."""

import functools
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]

# Finds no module of a distribution that the image does not have, as if it were not installed.
IMPORT = """
import importlib, importlib.machinery, json, os, pkgutil, sys
absent, packages, modules = map(json.loads, sys.argv[1:])
class Image(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else super().find_spec(name, path, target)
sys.meta_path[:] = [
    Image if one is importlib.machinery.PathFinder else one
    for one in sys.meta_path
    if one.__module__ in ("_frozen_importlib", "_frozen_importlib_external")
]
os.environ["USE_TORCH"] = "0"
for name in packages:
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        if module.name != "sps2_cli.__main__":
            importlib.import_module(module.name)
for name in modules:
    importlib.import_module(name)
"""


def distributions(extras: Iterable[str], others: Iterable[str] = ()) -> set[str]:
    """Names, normalised, of what installing the project with these extras and others brings along, itself left out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = project["optional-dependencies"]
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    todo = [*project["dependencies"], *others, *(one for extra in extras for one in groups[extra])]
    while todo:
        requirement = Requirement(todo.pop())
        name = normal(requirement.name)
        if name == "sps2":
            todo += [one for extra in requirement.extras for one in groups[extra]]
            continue
        for extra in {"", *requirement.extras}:
            if (name, extra) not in seen:
                seen.add((name, extra))
                todo += _needed(name, extra)
        found.add(name)
    return found


def normal(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def import_all(held: set[str], packages: Sequence[str], modules: Sequence[str] = ()) -> str:
    """Imports all modules of `packages`, and `modules`, where only `held` is installed; what went wrong."""
    absent = [
        module
        for module, owners in metadata.packages_distributions().items()
        if not {normal(one) for one in owners} & (held | {"sps2"})
    ]
    run = subprocess.run(
        [sys.executable, "-P", "-c", IMPORT, *map(json.dumps, (absent, packages, modules))],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env=dict(os.environ),
    )
    return run.stderr if run.returncode else ""


@functools.cache
def _needed(name: str, extra: str) -> tuple[str, ...]:
    requirements = [Requirement(text) for text in metadata.requires(name) or []]
    return tuple(
        f"{one.name}[{','.join(one.extras)}]"
        for one in requirements
        if (one.marker is None and not extra) or (one.marker and one.marker.evaluate({"extra": extra}))
    )
