"""Tiny random checkpoints of every served family, as transformers would publish them.

Each is a complete folder: config.json, safetensors (one file or shards) and a tokenizer in which every byte
is a token, so a whole deployment can run on it. Weights are scaled so that the models are no push-overs:
attention is sharp enough that losing a part of the KV changes the text, and the best logit stands clear of
the second.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

NUM_BYTES = 256
BOS_ID = 256
EOS_ID = 257
VOCAB_SIZE = 258

FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 65_536,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}
_BY_FAMILY: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": None}}

_EMBEDDING_RMS = 0.5  # small beside what attention adds, or tied models would just repeat their input
_LOGIT_STD = 4.0
_SHARPNESS = 2.0  # of q and of k


def make_tiny_checkpoint(
    folder: Path,
    family: str,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Writes a tiny random checkpoint and returns its folder.

    Args:
        folder: is created where needed.
        family: "llama", "mistral", "qwen2" or "qwen3".
        dtype: of the saved tensors.
        seed: of the weights.
        max_shard_size: as transformers has it; "40KB" makes several shards and an index.
        **overrides: keys of the family's transformers config, such as `num_key_value_heads=1`.
    """
    config_class, model_class = FAMILIES[family]
    config = config_class(**(_SHAPE | _BY_FAMILY.get(family, {}) | overrides))
    model = model_class(config).eval()
    _randomize(model, seed)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    write_byte_tokenizer(folder)
    return folder


def write_byte_tokenizer(folder: Path) -> None:
    """Writes tokenizer files: byte b is token b, then <s> and </s>; text in, text out, any bytes survive."""
    # ByteLevel stands each byte for one printable character; printable Latin-1 stands for itself.
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(NUM_BYTES) if byte not in plain]
    characters = {byte: chr(byte) for byte in plain} | {b: chr(NUM_BYTES + i) for i, b in enumerate(others)}
    vocab = {character: byte for byte, character in characters.items()} | {"<s>": BOS_ID, "</s>": EOS_ID}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    make_tokenizer: Any = PreTrainedTokenizerFast  # it has no types
    wrapped = make_tokenizer(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(folder)


@torch.no_grad()
def _randomize(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        tensor.normal_(generator=generator)
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            tensor.mul_(0.1).add_(_SHARPNESS)
        elif name.endswith("norm.weight"):
            tensor.mul_(0.1).add_(1.0)
        elif name.endswith(".bias"):
            tensor.mul_(0.1)
        elif name.endswith("embed_tokens.weight"):
            tensor.mul_(_EMBEDDING_RMS)
        else:
            tensor.mul_(_gain(name) * tensor.shape[1] ** -0.5)


def _gain(name: str) -> float:
    """How much larger than a variance-preserving matrix."""
    if "q_proj" in name or "k_proj" in name:
        return _SHARPNESS
    return _LOGIT_STD if "lm_head" in name else 1.5
