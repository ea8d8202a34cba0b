"""ModelFolder over small made-up checkpoints."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sps2_service import model_hash
from sps2_service.model_folder import ModelFolder, ModelFolderError

CONFIG = {"max_position_embeddings": 4096, "vocab_size": 100, "eos_token_id": 1, "bos_token_id": 0}


def write_weights(path: Path, data: bytes = bytes(64)) -> None:
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tiny"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "tokenizer.json").write_text("{}")
    write_weights(path / "model.safetensors")
    return path


def configure(folder: Path, **values: Any) -> ModelFolder:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **values}))
    return ModelFolder(folder)


def test_values(folder: Path) -> None:
    model = ModelFolder(folder)
    assert (model.name, model.context_length, model.vocab_size) == ("tiny", 4096, 100)
    assert (model.eos_token_ids, model.bos_token_id) == ((1,), 0)


def test_generation_config_goes_first(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert ModelFolder(folder).eos_token_ids == (5, 7)


def test_absent_special_tokens(folder: Path) -> None:
    model = configure(folder, eos_token_id=None, bos_token_id=None)
    assert (model.eos_token_ids, model.bos_token_id) == ((), None)


def test_nested_text_config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"text_config": CONFIG}))
    model = ModelFolder(folder)
    assert (model.context_length, model.eos_token_ids) == (4096, (1,))


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    model = ModelFolder(folder, weights=False)
    assert (model.context_length, model.weight_files) == (4096, ())
    with pytest.raises(ModelFolderError, match="a model has its hash from its weights"):
        _ = model.model_hash


def test_the_hash_is_printed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["model_hash", str(folder)])
    assert model_hash.main() == 0
    assert capsys.readouterr().out == f"{ModelFolder(folder).model_hash}\n"
    (folder / "model.safetensors").unlink()
    assert model_hash.main() == 1
    assert "no *.safetensors file" in capsys.readouterr().err


def test_name_of_a_relative_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert ModelFolder(".").name == "tiny"


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def write_config(**values: Any) -> Callable[[Path], object]:
    return write("config.json", json.dumps({**CONFIG, **values}))


def cut(size: int) -> Callable[[Path], object]:
    def shorten(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:size])

    return shorten


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no such folder"),
        (remove("config.json"), r"config\.json: cannot be read: No such file"),
        (remove("tokenizer.json"), "tokenizer absent"),
        (remove("model.safetensors"), r"no \*\.safetensors file"),
        (write("config.json", "{nonsense"), r"config\.json: not JSON"),
        (write("config.json", "[]"), r"config\.json: not a JSON object"),
        (write("generation_config.json", "\xff"), r"generation_config\.json: not JSON"),
        (write_config(vocab_size="many"), "vocab_size must be a positive integer"),
        (write_config(vocab_size=True), "vocab_size must be a positive integer"),
        (write_config(max_position_embeddings=None), "max_position_embeddings must be a positive integer"),
        (write_config(eos_token_id=100), "eos_token_id must be token ids under 100"),
        (write_config(eos_token_id=["x"]), "eos_token_id must be token ids"),
        (write("model.safetensors.index.json", '{"weight_map": {"a": "m-1.safetensors"}}'), "is missing"),
        (cut(4), "truncated or not a safetensors file"),
        (cut(30), "truncated or not a safetensors file"),
        (cut(-1), r"truncated: its header promises 64 bytes, 63 are there"),
        (write("model.safetensors", "\x02" + "\0" * 7 + "[]"), "header is broken"),
    ],
)  # fmt: skip
def test_each_fault_is_one_clear_line(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(ModelFolderError, match=message) as caught:
        ModelFolder(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_hash_is_stable_and_sees_changes(folder: Path, tmp_path: Path) -> None:
    first = ModelFolder(folder).model_hash
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert ModelFolder(copy).model_hash == first
    assert configure(copy, rope_theta=5).model_hash != first
    shutil.copy(folder / "config.json", copy)
    write_weights(copy / "model.safetensors", bytes(63) + b"\1")
    fine_tuned = ModelFolder(copy).model_hash
    assert fine_tuned != first
    write_weights(copy / "model.safetensors", bytes(65))
    assert ModelFolder(copy).model_hash not in {first, fine_tuned}


def test_hash_of_a_large_file_reads_little_of_it(folder: Path) -> None:
    size = 1 << 40  # sparse: only a hash that skips most of it comes back at all
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    assert len(ModelFolder(folder).model_hash) == 64


def test_the_demo_model_is_served_as_it_is(repo_root: Path) -> None:
    model = ModelFolder(repo_root / "models" / "demo")
    assert model.name == "demo"
    assert model.eos_token_ids
