"""What would be in the images: all that their services import, all of it pinned, and no torch for the control plane."""

from pathlib import Path

import pytest

from support.images import distributions, import_all, normal

CONTROL = distributions(["router", "cli"])
WORKER = distributions(["worker"], ["huggingface_hub"])
"""What docker/*.Dockerfile install."""


def test_dockerfiles_install_this(repo_root: Path) -> None:
    assert 'pip install ".[router,cli]"' in (repo_root / "docker/control.Dockerfile").read_text()
    assert (repo_root / "docker/worker.Dockerfile").read_text().count('".[worker]" huggingface_hub') == 2


def test_everything_in_them_is_pinned(repo_root: Path) -> None:
    pins = (repo_root / "constraints.txt").read_text().splitlines()
    pinned = {normal(line.partition("==")[0]) for line in pins if line and not line.startswith("#")}
    assert (CONTROL | WORKER) - pinned == set()


def test_the_control_plane_has_no_torch() -> None:
    assert CONTROL & {"torch", "triton", "nixl", "nvidia-ml-py"} == set()
    assert {"torch", "triton", "nixl"} <= WORKER


@pytest.mark.parametrize(
    ("held", "packages"),
    [
        (
            CONTROL,
            ["sps2_router", "sps2_kv_directory", "sps2_service", "sps2_layout", "sps2_client", "sps2_cli"],
        ),
        (
            WORKER,
            ["sps2_prefill_worker", "sps2_decode_worker", "sps2_service", "sps2_engine", "sps2_kernels"],
        ),
    ],
    ids=["control", "worker"],
)
def test_services_and_the_download_import_nothing_else(held: set[str], packages: list[str]) -> None:
    assert import_all(held, packages, ["huggingface_hub.cli.hf"]) == ""


def test_what_is_missing_is_noticed() -> None:
    assert "No module named 'redis'" in import_all(CONTROL - {"redis"}, ["sps2_kv_directory"])
