"""What the control plane knows of a Hugging Face model folder, read without torch and transformers.

Knows nothing about tensors: the checks here are those that need no weights (missing or broken files), so that
`sps2 up` can refuse a folder with one clear line before it starts anything.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

MAX_HEADER_BYTES = 100 * 1024 * 1024  # the limit of the safetensors library itself
SAMPLES_PER_FILE = 16
SAMPLE_BYTES = 4096


class ModelFolderError(ValueError):
    """The folder holds no model that can be served; one line that names the file and the fault."""


class ModelFolder:
    """One checkpoint folder: config.json, tokenizer.json, *.safetensors, optionally generation_config.json.

    Making one checks that all of them are there and readable; values are read once. With `weights=False`
    the safetensors may be missing and are not looked at.

    Raises:
        ModelFolderError: a file is missing, no valid JSON or truncated, or a value is not what it must be.
    """

    def __init__(self, path: str | Path, *, weights: bool = True) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ModelFolderError(f"{self.path}: no such folder")
        self.config = _read_json(self.path / "config.json")
        """config.json as it is."""
        self._generation = _read_json(self.path / "generation_config.json", optional=True)
        # Multimodal checkpoints nest the language model's values.
        self._text: Mapping[str, Any] = self.config.get("text_config") or self.config
        if not (self.path / "tokenizer.json").is_file():
            raise ModelFolderError(f"{self.path}: tokenizer absent: tokenizer.json is missing")
        self.weight_files = tuple(sorted(self.path.glob("*.safetensors"))) if weights else ()
        """The checkpoint's files, by name."""
        if weights:
            self._check_weight_files()
        self.context_length = self._positive("max_position_embeddings")
        """Most tokens of prompt and answer together."""
        self.vocab_size = self._positive("vocab_size")
        """Token ids are 0 to vocab_size - 1."""
        self.eos_token_ids = self._token_ids("eos_token_id")
        """Ids that end a generation; generation_config.json goes before config.json; may be empty."""
        self.bos_token_id = next(iter(self._token_ids("bos_token_id")), None)
        """Id that begins a text, if the model has one."""

    @property
    def name(self) -> str:
        """The folder's name, under which the model is served unless the operator says otherwise."""
        return self.path.resolve().name

    @cached_property
    def keys_per_token(self) -> int:
        """So many keys that a token sees cost as much as its matrix products: its share of FLOPs, in every layer.

        Raises:
            ModelFolderError: a size is missing.
        """
        hidden, heads = self._positive("hidden_size"), self._positive("num_attention_heads")
        kv_heads = self._text.get("num_key_value_heads") or heads
        head_dim = self._text.get("head_dim") or hidden // heads
        weights = 2 * hidden * head_dim * (heads + kv_heads) + 3 * hidden * self._positive(
            "intermediate_size"
        )
        return max(1, 2 * weights // (4 * head_dim * heads))

    @cached_property
    def model_hash(self) -> str:
        """SHA-256 (hex) by which ranks and services make sure that they serve the same model.

        Over config.json and, of each weight file, name, size, header and a few samples spread over its data:
        a few milliseconds at any size. It tells fine-tunes of one architecture apart, but is no proof against
        a forger, nor against a change between the samples.

        Raises:
            ModelFolderError: it is a folder without weights.
        """
        if not self.weight_files:
            raise ModelFolderError(f"{self.path}: a model has its hash from its weights, which were not read")
        digest = hashlib.sha256()
        digest.update((self.path / "config.json").read_bytes())
        for path in self.weight_files:
            with path.open("rb") as file:
                size = path.stat().st_size
                header = _read_header(file, path, size)
                digest.update(f"\0{path.name}\0{size}\0{len(header)}\0".encode())
                digest.update(header)
                for sample in _samples(file, start=8 + len(header), end=size):
                    digest.update(sample)
        return digest.hexdigest()

    def _check_weight_files(self) -> None:
        if not self.weight_files:
            raise ModelFolderError(f"{self.path}: no *.safetensors file (other weight formats are not read)")
        index = _read_json(self.path / "model.safetensors.index.json", optional=True)
        have = {path.name for path in self.weight_files}
        missing = sorted(set(index.get("weight_map", {}).values()) - have)
        if missing:
            raise ModelFolderError(
                f"{self.path}: {missing[0]} is missing ({len(missing)} of the index's files)"
            )
        for path in self.weight_files:
            with path.open("rb") as file:
                _read_header(file, path, path.stat().st_size)

    def _positive(self, key: str) -> int:
        value = self._text.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ModelFolderError(
                f"{self.path / 'config.json'}: {key} must be a positive integer, is {value!r}"
            )
        return value

    def _token_ids(self, key: str) -> tuple[int, ...]:
        for source in (self._generation, self.config, self._text):
            value = source.get(key)
            if value is None:
                continue
            ids = value if isinstance(value, list) else [value]
            if not all(isinstance(one, int) and 0 <= one < self.vocab_size for one in ids):
                raise ModelFolderError(
                    f"{self.path}: {key} must be token ids under {self.vocab_size}: {value!r}"
                )
            return tuple(ids)
        return ()


def _read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    if optional and not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelFolderError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelFolderError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelFolderError(f"{path}: not a JSON object")
    return content


def _read_header(file: BinaryIO, path: Path, size: int) -> bytes:
    """The JSON header of a safetensors file (without its 8 length bytes), checked against the file's size."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise ModelFolderError(f"{path}: truncated or not a safetensors file")
    header = file.read(length)
    try:
        tensors: Any = json.loads(header)
        end = max(
            (entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"), default=0
        )
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ModelFolderError(f"{path}: not a safetensors file: its header is broken") from error
    if end != size - 8 - length:
        raise ModelFolderError(
            f"{path}: truncated: its header promises {end} bytes, {size - 8 - length} are there"
        )
    return header


def _samples(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    """SAMPLES_PER_FILE pieces of SAMPLE_BYTES, evenly spread from `start` to `end`."""
    span = max(0, end - start - SAMPLE_BYTES)
    for number in range(SAMPLES_PER_FILE):
        file.seek(start + span * number // (SAMPLES_PER_FILE - 1))
        yield file.read(min(SAMPLE_BYTES, end - file.tell()))
