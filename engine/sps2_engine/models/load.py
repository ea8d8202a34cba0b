"""Makes decoders: from a checkpoint folder, or with random weights."""

from pathlib import Path

import torch

from sps2_engine.mesh import WHOLE_MODEL, TensorShare
from sps2_engine.models.config import ModelConfig, read_model_config
from sps2_engine.models.decoder import Decoder
from sps2_engine.weights import CheckpointWeights, Progress, RandomWeights


def load_decoder(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress = lambda _fraction: None,
    share: TensorShare = WHOLE_MODEL,
) -> Decoder:
    """Loads a Hugging Face checkpoint.

    Args:
        folder: holds config.json and safetensors files.
        dtype: what to compute in; tensors are converted one by one.
        device: where the model lives.
        progress: called with the fraction loaded, rising to 1.0.
        share: what a tensor rank holds; only that is read.

    Raises:
        CheckpointError: in one line, what is wrong with the folder and what to do.
        ValueError: in one line, why the model cannot be split so.
    """
    config = read_model_config(folder)
    source = CheckpointWeights(folder, dtype, device, config.num_parameters, progress)
    decoder = Decoder(config, source, share)
    progress(1.0)
    return decoder


def random_decoder(
    config: ModelConfig,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    share: TensorShare = WHOLE_MODEL,
) -> Decoder:
    """A model of this shape with random weights: the same for the same seed, on every rank of every mesh."""
    return Decoder(config, RandomWeights(seed, dtype, device), share)
