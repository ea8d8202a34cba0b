"""The house's lists of rooms agree with each other, and the control plane runs without torch."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

CONTROL_PLANE = ["sps2_router", "sps2_kv_directory", "sps2_service", "sps2_layout", "sps2_client", "sps2_cli"]

# Imports every module of a package and prints the forbidden libraries that came along. import-linter follows
# our own imports only; a third-party library that pulls torch in is seen here alone.
IMPORT_ALL = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(*sorted({"torch", "triton", "nixl"} & set(sys.modules)))
"""


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())


@pytest.mark.parametrize("package", CONTROL_PLANE)
def test_control_plane_imports_no_torch(package: str, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-P", "-c", IMPORT_ALL, package],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        cwd=tmp_path,
        env=dict(os.environ),
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == ""


def test_lists_of_rooms_agree(pyproject: dict[str, Any]) -> None:
    tool = pyproject["tool"]
    wheel = tool["hatch"]["build"]["targets"]["wheel"]["packages"]
    roots = [package.rpartition("/")[0] for package in wheel]
    names = [package.rpartition("/")[2] for package in wheel]
    assert tool["hatch"]["build"]["dev-mode-dirs"] == roots
    assert tool["mypy"]["mypy_path"] == [*roots, "tests"]
    assert tool["importlinter"]["root_packages"] == names
    assert tool["ruff"]["lint"]["isort"]["known-first-party"] == [*names, "support"]


def test_every_package_in_the_tree_is_listed(pyproject: dict[str, Any], repo_root: Path) -> None:
    listed = set(pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    found = {path.parent.relative_to(repo_root).as_posix() for path in repo_root.glob("*/sps2_*/__init__.py")}
    assert found | {"protos/python/sps2"} == listed


def test_direct_dependencies_are_pinned(pyproject: dict[str, Any], repo_root: Path) -> None:
    def name(requirement: str) -> str:
        for sign in ">=<;[ ":
            requirement = requirement.partition(sign)[0]
        return requirement.lower()

    project = pyproject["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    direct = {name(requirement) for group in groups for requirement in group} - {"sps2"}
    pins = (repo_root / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower() for line in pins if line and not line.startswith("#")}
    assert direct - pinned == set()
