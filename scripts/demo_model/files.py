"""Files: checkpoints of a run, and the model folder that transformers and the server load.

Each file is written beside its place and moved there, so a reader sees the old one or the new one.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from scripts.demo_model.facts import facts_json
from scripts.demo_model.model import Llama
from scripts.demo_model.optimiser import Optimiser
from scripts.demo_model.text import BOS, EOS, token_id


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a new file, then put it in the place of `path`."""
    fresh = path.with_name(f".{path.name}.new")
    write(fresh)
    fresh.chmod(0o644)
    fresh.replace(path)


def write_text(path: Path, text: str) -> None:
    """Put a text in place."""
    replace(path, lambda fresh: fresh.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Put tensors in place as safetensors."""
    kept = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    replace(path, lambda fresh: save_file(kept, fresh, metadata={"format": "pt"}))


def save_checkpoint(folder: Path, model: Llama, optimiser: Optimiser, steps: int, tokens: int) -> None:
    """Keep what a run needs to go on; the step count goes last."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", model.state_dict())
    write_tensors(folder / "optimiser.safetensors", optimiser.state)
    write_text(folder / "state.json", json.dumps({"step": steps, "tokens": tokens}))


def load_checkpoint(folder: Path, model: Llama, optimiser: Optimiser) -> tuple[int, int]:
    """Restore the last checkpoint: steps done and tokens seen, both 0 where there is none."""
    if not (folder / "state.json").exists():
        return 0, 0
    model.load_state_dict(load_file(folder / "model.safetensors"))
    for name, value in load_file(folder / "optimiser.safetensors").items():
        optimiser.state[name].copy_(value)
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return int(state["step"]), int(state["tokens"])


def published_name(name: str) -> str:
    """The name a parameter has in a published Llama checkpoint."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def load_weights(folder: Path, model: Llama) -> None:
    """Load a model folder's weights, in fp32."""
    stored = load_file(folder / "model.safetensors")
    model.load_state_dict({name: stored[published_name(name)].float() for name in model.state_dict()})


def export(model: Llama, tokenizer: Tokenizer, prompt: str, folder: Path) -> None:
    """Write the model folder: weights in bf16, configs, tokenizer, facts and the demo's prompt."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in configs(model, tokenizer).items():
        write_text(folder / name, json.dumps(value, indent=2) + "\n")
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    write_text(folder / "facts.json", facts_json())
    write_text(folder / "prompt.txt", prompt)
    weights = {published_name(name): value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    write_tensors(folder / "model.safetensors", weights)


def configs(model: Llama, tokenizer: Tokenizer) -> dict[str, dict[str, object]]:
    """The folder's JSON configs by file name, as transformers reads them."""
    shape = model.shape
    bos, eos = token_id(tokenizer, BOS), token_id(tokenizer, EOS)
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.inner,
        "max_position_embeddings": shape.max_position,
        "mlp_bias": False,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": shape.eps,
        "rope_scaling": None,
        "rope_theta": shape.theta,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocab,
    }
    tokenizer_config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.max_position,
    }
    generation: dict[str, object] = {"bos_token_id": bos, "eos_token_id": eos, "do_sample": False}
    return {
        "config.json": config,
        "tokenizer_config.json": tokenizer_config,
        "generation_config.json": generation,
    }
