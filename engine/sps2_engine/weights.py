"""Where a model's tensors come from: a safetensors checkpoint, or a random number generator.

Knows names, shapes and files; knows nothing about what a layer does with its tensors. Layers ask for what
they hold (`WeightSource.fill`), so a layer that holds a part of a tensor decides so itself; only that part is read.
"""

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sps2_engine.mesh import Part

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LOADABLE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

Progress = Callable[[float], None]


class CheckpointError(Exception):
    """A checkpoint folder cannot be served; the message is one line that names the culprit and the remedy."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What norms, angles and the hidden states of a model are kept in that computes in `dtype`: at least fp32.

    They are a small part of the work, and what is rounded in them is carried through every layer.
    """
    return torch.promote_types(dtype, torch.float32)


def table_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What embedding and output matrix are kept in: on a CPU fp32.

    A product there rounds its result to the dtype of its operands, and logits of 20 are an eighth apart in bf16.
    """
    return wide_dtype(dtype) if device.type == "cpu" else dtype


class WeightSource(Protocol):
    """What layers are built from. Each layer calls `fill` once per tensor, while the model is constructed."""

    dtype: torch.dtype
    """The dtype of the layers' matrix products; layers allocate with it or what follows from it."""
    device: torch.device
    """The device the layers live on."""

    def has(self, name: str) -> bool:
        """Whether `fill` can be asked for this name."""
        ...

    def fill(self, name: str, target: Tensor, part: Part | None = None, dim: int = 0) -> None:
        """Writes the tensor of this name, or a part of it, into `target`, converting its dtype.

        Args:
            name: of the whole tensor.
            target: what to write to; along `dim` as long as `part`.
            part: the range of dimension `dim` that is wanted; None: all of the tensor.
            dim: the dimension that `part` cuts.

        Raises:
            CheckpointError: if it is missing or its shape is not the one asked for.
        """
        ...


def whole_shape(target: Tensor, part: Part | None, dim: int) -> list[int]:
    """Shape of a tensor of which `target` takes the `part` of dimension `dim`.

    Raises:
        ValueError: the target is not as long as the part.
    """
    shape = list(target.shape)
    if part is not None:
        if shape[dim] != len(part):
            raise ValueError(f"a target of shape {shape} cannot take {part.span} of dimension {dim}")
        shape[dim] = part.whole
    return shape


class CheckpointWeights:
    """The tensors of a Hugging Face folder, memory-mapped and converted one tensor at a time.

    Args:
        folder: holds `model.safetensors`, or shards and `model.safetensors.index.json`.
        dtype: dtype of the filled tensors.
        device: device of the filled tensors.
        num_parameters: elements of all tensors that the model will ask for, or for parts of; scales the progress.
        progress: called with the fraction loaded, in (0, 1], after each tensor.

    Raises:
        CheckpointError: if there are no weights, or a file is absent or damaged.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype, device: torch.device, num_parameters: int, progress: Progress
    ) -> None:
        self.dtype = dtype
        self.device = device
        self._progress = progress
        self._num_expected = num_parameters
        self._num_filled = 0
        # Every header is read at once, so that a damaged shard is found before minutes of loading.
        self._files = {path: _open(path) for path in _weight_files(folder)}
        self._home = {name: path for path, file in self._files.items() for name in file.keys()}  # noqa: SIM118
        self._folder = folder

    def has(self, name: str) -> bool:
        """Whether some file holds this tensor."""
        return name in self._home

    def fill(self, name: str, target: Tensor, part: Part | None = None, dim: int = 0) -> None:
        """Copies one tensor, or the pages of it that hold the part, into `target`; see `WeightSource.fill`."""
        if name not in self._home:
            raise CheckpointError(
                f"{self._folder}: tensor {name!r} is missing; the checkpoint is incomplete or config.json "
                "describes another model"
            )
        path = self._home[name]
        view, wanted = self._files[path].get_slice(name), whole_shape(target, part, dim)
        if view.get_shape() != wanted:
            raise CheckpointError(
                f"{path}: tensor {name!r} has shape {view.get_shape()} where config.json asks for "
                f"{wanted}; take both files from the same model"
            )
        if part is None or part.is_all:
            tensor = self._files[path].get_tensor(name)
        else:
            tensor = view[(slice(None),) * dim + (part.span.slice,)]
        if tensor.dtype not in LOADABLE_DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name!r} is {tensor.dtype}; use a checkpoint in bf16, fp16 or fp32"
            )
        target.copy_(tensor)
        self._num_filled += math.prod(wanted)
        self._progress(min(1.0, self._num_filled / self._num_expected))


class RandomWeights:
    """Reproducible random tensors, for benchmarks at real shapes without a checkpoint.

    A tensor depends on the seed and on its name only, so every rank draws the same model. Matrices have
    standard deviation 1/sqrt(columns), which keeps activations of order one at any depth.
    """

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self._seed = seed

    def has(self, name: str) -> bool:
        """False: only what a layer requires exists, so embeddings that may be tied are tied."""
        return False

    def fill(self, name: str, target: Tensor, part: Part | None = None, dim: int = 0) -> None:
        """Draws a matrix; a norm's weight becomes one, a bias zero.

        The whole matrix is drawn and the part kept: however a model is split, it is the same model.
        """
        if part is not None and not part.is_all:
            whole = target.new_empty(whole_shape(target, part, dim))
            self.fill(name, whole)
            target.copy_(whole.narrow(dim, part.span.begin, len(part)))
            return
        if target.ndim == 1:
            target.fill_(0.0 if name.endswith(".bias") else 1.0)
            return
        generator = torch.Generator(target.device)
        # A checksum, since the CPU's generator looks at 32 bits of its seed only.
        generator.manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        target.normal_(std=target.shape[-1] ** -0.5, generator=generator)


class _TensorFile(Protocol):
    """The part of `safe_open` used here, with types."""

    def keys(self) -> list[str]: ...
    def get_tensor(self, name: str) -> Tensor: ...
    def get_slice(self, name: str) -> "_TensorSlice": ...


class _TensorSlice(Protocol):
    """The part of what `get_slice` returns used here: reads no more than it is indexed with."""

    def get_shape(self) -> list[int]: ...
    def __getitem__(self, index: tuple[slice, ...]) -> Tensor: ...


def _open(path: Path) -> _TensorFile:
    try:
        return cast("_TensorFile", safe_open(path, framework="pt"))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); it is damaged or truncated, download it again"
        ) from error


def _weight_files(folder: Path) -> list[Path]:
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if (folder / INDEX_FILE).is_file():
        return _shards(folder / INDEX_FILE)
    raise CheckpointError(
        f"{folder}: no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there; download the checkpoint in "
        "safetensors format (other formats must be converted first)"
    )


def _shards(index: Path) -> list[Path]:
    try:
        weight_map: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = [index.parent / name for name in sorted(set(weight_map.values()))]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index}: no valid index of shards ({type(error).__name__}: {error}); download it again"
        ) from error
    absent = [shard.name for shard in shards if not shard.is_file()]
    if absent:
        raise CheckpointError(
            f"{index}: {len(absent)} of {len(shards)} shards are absent, first {absent[0]!r}; "
            "download the rest of the checkpoint"
        )
    return shards
