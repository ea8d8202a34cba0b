"""Checkpoint files: what is loaded, how progress is told, and every fault as one clear line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sps2_engine.models import CheckpointError, Decoder, load_decoder
from sps2_engine.weights import RandomWeights
from support.checkpoints import make_tiny_checkpoint

CPU = torch.device("cpu")
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_checkpoint(tmp_path, "llama")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_tiny_checkpoint(tmp_path, "llama", max_shard_size="100KB")


def values(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention to oneself alone."""
    assert layer in range(2)
    return v.repeat_interleave(q.shape[1] // k.shape[1], dim=1)


def load(folder: Path) -> Decoder:
    return load_decoder(folder, torch.float32, CPU)


def logits(decoder: Decoder) -> torch.Tensor:
    ids = torch.arange(10)
    return decoder.logits(decoder.forward(ids, ids, values))


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as refused:
        load(folder)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def replace(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(folder / SINGLE)
    # Copies, for the file they are mapped from is about to be written.
    kept = {key: value.clone() for key, value in tensors.items() if key != name}
    save_file(kept | ({name: tensor} if tensor is not None else {}), folder / SINGLE)


def test_shards_load_like_one_file(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 2
    single = make_tiny_checkpoint(tmp_path_factory.mktemp("single"), "llama")
    assert torch.equal(logits(load(sharded)), logits(load(single)))


def test_progress_rises_to_one(folder: Path) -> None:
    fractions: list[float] = []
    load_decoder(folder, torch.bfloat16, CPU, fractions.append)
    assert fractions == sorted(fractions)
    assert 0 < fractions[0] < 0.2
    assert fractions[-1] == 1.0
    assert fractions[-2] == pytest.approx(1.0)


def test_decoder_computes_in_the_wanted_dtype(folder: Path) -> None:
    seen: list[torch.dtype] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.extend((q.dtype, k.dtype, v.dtype))
        return q

    ids = torch.arange(4)
    decoder = load_decoder(folder, torch.bfloat16, CPU)
    hidden = decoder.forward(ids, ids, attend)
    assert set(seen) == {torch.bfloat16}
    assert hidden.dtype == decoder.logits(hidden).dtype == torch.float32


def test_half_precision_files_load(folder: Path) -> None:
    replace(folder, Q_PROJ, load_file(folder / SINGLE)[Q_PROJ].half())
    load(folder)


def test_extra_tensors_are_ignored(folder: Path) -> None:
    replace(folder, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(8))
    load(folder)


def test_tied_config_with_another_head_in_the_file_uses_that_head(folder: Path) -> None:
    # As transformers does: the config is wrong, the file is what was trained.
    before = logits(load(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert torch.equal(logits(load(folder)), before)


def test_tied_config_with_the_same_head_in_the_file_holds_one_matrix(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    replace(folder, "lm_head.weight", load_file(folder / SINGLE)["model.embed_tokens.weight"].clone())
    decoder = load(folder)
    assert decoder._vocabulary.head.weight is decoder._vocabulary.embedding


def test_missing_tensor(folder: Path) -> None:
    replace(folder, Q_PROJ, None)
    assert f"{Q_PROJ!r} is missing" in refusal(folder)


def test_missing_head_of_an_untied_model(folder: Path) -> None:
    replace(folder, "lm_head.weight", None)
    assert "'lm_head.weight' is missing" in refusal(folder)


def test_wrong_shape(folder: Path) -> None:
    replace(folder, Q_PROJ, torch.zeros(64, 32))
    message = refusal(folder)
    assert Q_PROJ in message
    assert "[64, 32] where config.json asks for [64, 64]" in message


def test_integer_weights(folder: Path) -> None:
    replace(folder, Q_PROJ, torch.zeros(64, 64, dtype=torch.int8))
    assert f"{Q_PROJ!r} is torch.int8" in refusal(folder)


@pytest.mark.parametrize("size", [0, 5, 1000, -1])
def test_truncated_file(folder: Path, size: int) -> None:
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:size])
    message = refusal(folder)
    assert SINGLE in message
    assert "damaged or truncated" in message


def test_truncated_shard_is_found_before_loading(sharded: Path) -> None:
    last = max(sharded.glob("*.safetensors"))
    last.write_bytes(last.read_bytes()[:-1])
    fractions: list[float] = []
    with pytest.raises(CheckpointError, match=last.name):
        load_decoder(sharded, torch.float32, CPU, fractions.append)
    assert fractions == []


def test_absent_shard(sharded: Path) -> None:
    first = min(sharded.glob("*.safetensors"))
    first.unlink()
    message = refusal(sharded)
    assert INDEX in message
    assert first.name in message


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_damaged_index(sharded: Path, index: str) -> None:
    (sharded / INDEX).write_text(index)
    assert "no valid index of shards" in refusal(sharded)


def test_no_weights(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "no weights: neither model.safetensors nor" in refusal(folder)


def test_unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    assert "'GPT2LMHeadModel'" in refusal(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_damaged_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert "config.json" in refusal(folder)


def test_no_config_and_no_folder(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json; give the folder of a Hugging Face checkpoint" in refusal(folder)
    assert "no config.json" in refusal(folder / "nowhere")


def test_random_weights_depend_on_seed_and_name_alone() -> None:
    def draw(seed: int, name: str) -> torch.Tensor:
        target = torch.empty(512, 256)
        RandomWeights(seed, torch.float32, CPU).fill(name, target)
        return target

    assert torch.equal(draw(1, "a.weight"), draw(1, "a.weight"))
    assert not torch.equal(draw(1, "a.weight"), draw(1, "b.weight"))
    assert not torch.equal(draw(1, "a.weight"), draw(2, "a.weight"))
    assert draw(1, "a.weight").std() == pytest.approx(1 / 16, rel=0.02)
