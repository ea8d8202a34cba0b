"""The same logits on every mesh of sequence and tensor ranks as in one process, and the bytes that were counted."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sps2_engine.attention.cost_model import Exchange
from sps2_engine.mesh import Mesh
from support.checkpoints import make_tiny_checkpoint
from support.identity import byte_prompts
from support.mesh_cases import (
    LOGIT_TOLERANCE,
    MASKS,
    MESHES,
    RankRun,
    assembled,
    reference_logits,
    run_model,
)
from support.oracle import NEAR_TIE

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 8/2": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_attention_heads": 8}),
    "one KV head": ("mistral", {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8}),
    "qwen2": ("qwen2", {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"num_attention_heads": 4, "num_key_value_heads": 4}),
}
EXCHANGES: tuple[Exchange, ...] = ("heads", "kv")
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


def check(folder: Path, mesh: Mesh, mask: str, prompt: tuple[int, ...], runs: list[RankRun]) -> None:
    expected, actual = reference_logits(folder, mask, prompt), assembled(runs, mesh)
    torch.testing.assert_close(actual, expected, rtol=0, atol=LOGIT_TOLERANCE)
    top = expected.topk(2).values
    clear = top[:, 0] - top[:, 1] > NEAR_TIE
    assert torch.equal(actual.argmax(1)[clear], expected.argmax(1)[clear])
    assert int(clear.sum()) > 0.9 * len(prompt)
    for run in runs:
        assert run.exchanged == run.planned
        assert run.summed == run.counted
    assert len({run.num_slices for run in runs}) == 1


@pytest.mark.parametrize("mesh", [Mesh(2, 2), Mesh(1, 4)], ids=name_of)
@pytest.mark.parametrize("model", MODELS)
def test_every_family(folders: dict[str, Path], model: str, mesh: Mesh) -> None:
    """Under a mask whose samples go by KV head: one that counts heads from its own first one differs."""
    runs = run_model(folders[model], mesh, "csa", PROMPT)
    check(folders[model], mesh, "csa", PROMPT, runs)
    assert runs[0].num_slices >= 3
    assert (min(run.exchanged for run in runs) > 0) == (mesh.sp > 1)
    assert (min(run.summed for run in runs) > 0) == (mesh.tp > 1)


@pytest.mark.parametrize("mesh", MESHES, ids=name_of)
@pytest.mark.parametrize("mask", MASKS)
def test_every_mesh(folders: dict[str, Path], mask: str, mesh: Mesh) -> None:
    folder = folders["llama 8/2"]
    for exchange in EXCHANGES if mesh == Mesh(2, 2) else EXCHANGES[:1]:
        check(folder, mesh, mask, PROMPT, run_model(folder, mesh, mask, PROMPT, exchange))


@pytest.mark.parametrize("mesh", [Mesh(4, 2), Mesh(3, 2)], ids=name_of)
@pytest.mark.parametrize("mask", ["exact", "csa"])
def test_ranks_without_tokens_stay_in_step(folders: dict[str, Path], mask: str, mesh: Mesh) -> None:
    """Two tokens on more slices than that, and three sequence ranks where two divide the shards."""
    folder = folders["llama 8/2"]
    for prompt in (SHORT, PROMPT):
        check(folder, mesh, mask, prompt, run_model(folder, mesh, mask, prompt))


def test_masks_differ(folders: dict[str, Path]) -> None:
    """Else the comparisons above would prove little."""
    folder = folders["llama 8/2"]
    exact, sparse = (reference_logits(folder, mask, PROMPT) for mask in ("exact", "csa"))
    assert float((exact - sparse).abs().max()) > 100 * LOGIT_TOLERANCE
