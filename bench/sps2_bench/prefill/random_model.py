"""A checkpoint folder of random weights as published ones are: every program runs the same model."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sps2_engine.mesh import Part
from sps2_engine.models import Decoder, ModelConfig
from sps2_engine.weights import RandomWeights

DEFAULT_SHAPE = {
    "hidden": 512,
    "intermediate": 1408,
    "layers": 8,
    "heads": 8,
    "kv_heads": 2,
    "head_dim": 64,
    "vocab": 2048,
}
MAX_POSITION = 1 << 21


class RecordedWeights(RandomWeights):
    """Random weights that keep what they give, by published name."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, torch.float32, torch.device("cpu"))
        self.tensors: dict[str, Tensor] = {}

    def fill(self, name: str, target: Tensor, part: Part | None = None, dim: int = 0) -> None:
        """See `WeightSource.fill`."""
        super().fill(name, target, part, dim)
        self.tensors[name] = target.clone()


def model_config(shape: dict[str, int]) -> ModelConfig:
    """The model of a shape with the keys of `DEFAULT_SHAPE`.

    Raises:
        ValueError: the sizes do not fit each other.
    """
    return ModelConfig(
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_layers=shape["layers"],
        num_q_heads=shape["heads"],
        num_kv_heads=shape["kv_heads"],
        head_dim=shape["head_dim"],
        vocab_size=shape["vocab"],
        max_position=MAX_POSITION,
    )


def write_random_model(config: ModelConfig, folder: Path, seed: int = 0) -> Path:
    """Writes config.json and fp32 weights of a random Llama into `folder`, and returns it."""
    weights = RecordedWeights(seed)
    Decoder(config, weights)
    save_file(weights.tensors, folder / "model.safetensors", metadata={"format": "pt"})
    published = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_q_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(published), encoding="utf-8")
    return folder
