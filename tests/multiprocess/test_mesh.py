"""The same logits on every mesh of sequence and tensor ranks as in one process, and the bytes that were counted."""

from pathlib import Path

import pytest

from sps2_engine.mesh import Mesh
from support.checkpoints import make_tiny_checkpoint
from support.identity import byte_prompts
from support.mesh_cases import (
    EXCHANGES,
    LOGIT_TOLERANCE,
    MASKS,
    MESHES,
    MODELS,
    check_mesh,
    reference_logits,
    run_model,
)

(PROMPT,) = byte_prompts([150])
(SHORT,) = byte_prompts([2])


def name_of(mesh: Mesh) -> str:
    return f"{mesh.sp}x{mesh.tp}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: make_tiny_checkpoint(tmp_path_factory.mktemp("model"), family, **overrides)
        for name, (family, overrides) in MODELS.items()
    }


@pytest.mark.parametrize("mesh", [Mesh(2, 2), Mesh(1, 4)], ids=name_of)
@pytest.mark.parametrize("model", MODELS)
def test_every_family(folders: dict[str, Path], model: str, mesh: Mesh) -> None:
    """Under a mask whose samples go by KV head: one that counts heads from its own first one differs."""
    runs = run_model(folders[model], mesh, "csa", PROMPT)
    check_mesh(folders[model], mesh, "csa", PROMPT, runs)
    assert runs[0].num_slices >= 3
    assert (min(run.exchanged for run in runs) > 0) == (mesh.sp > 1)
    assert (min(run.summed for run in runs) > 0) == (mesh.tp > 1)


@pytest.mark.parametrize("mesh", MESHES, ids=name_of)
@pytest.mark.parametrize("mask", MASKS)
def test_every_mesh(folders: dict[str, Path], mask: str, mesh: Mesh) -> None:
    folder = folders["llama 8/2"]
    for exchange in EXCHANGES if mesh == Mesh(2, 2) else EXCHANGES[:1]:
        check_mesh(folder, mesh, mask, PROMPT, run_model(folder, mesh, mask, PROMPT, exchange))


@pytest.mark.parametrize("mesh", [Mesh(4, 2), Mesh(3, 2)], ids=name_of)
@pytest.mark.parametrize("mask", ["exact", "csa"])
def test_ranks_without_tokens_stay_in_step(folders: dict[str, Path], mask: str, mesh: Mesh) -> None:
    """Two tokens on more slices than that, and three sequence ranks where two divide the shards."""
    folder = folders["llama 8/2"]
    for prompt in (SHORT, PROMPT):
        check_mesh(folder, mesh, mask, prompt, run_model(folder, mesh, mask, prompt))


def test_masks_differ(folders: dict[str, Path]) -> None:
    """Else the comparisons above would prove little."""
    folder = folders["llama 8/2"]
    exact, sparse = (reference_logits(folder, mask, PROMPT) for mask in ("exact", "csa"))
    assert float((exact - sparse).abs().max()) > 100 * LOGIT_TOLERANCE
