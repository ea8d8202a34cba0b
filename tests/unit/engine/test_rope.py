"""Rotary embeddings against transformers, for every published frequency schedule and spelling."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from sps2_engine.layers.rope import DefaultRope, RotaryEmbedding
from sps2_engine.models import CheckpointError, ModelConfig, read_model_config

HEAD_DIM = 128
SHAPE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 256,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "default-1e6": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0},
    "llama3": LLAMA3,
    "llama3.2": {**LLAMA3, "factor": 32.0},
    "yarn-qwen": {**YARN, "factor": 4.0, "original_max_position_embeddings": 32_768, "rope_theta": 1e6},
    "yarn-no-original": {**YARN, "factor": 4.0},
    "yarn-attention-factor": {**YARN, "factor": 16.0, "attention_factor": 0.75},
    "yarn-mscale": {**YARN, "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0},
    "yarn-one-mscale": {**YARN, "factor": 40.0, "mscale": 0.707},
    "yarn-betas": {**YARN, "factor": 8.0, "beta_fast": 24, "beta_slow": 2},
    "yarn-borders": {**YARN, "factor": 8.0, "truncate": False, "original_max_position_embeddings": 4096},
    "yarn-no-stretch": {**YARN, "factor": 1.0},
}
POSITIONS = torch.cat((torch.arange(64), torch.tensor([4095, 8191, 32_767, 65_537, 131_071, 1_000_003])))


def read(folder: Path, **config: Any) -> ModelConfig:
    document = SHAPE | {"architectures": ["LlamaForCausalLM"]} | config
    (folder / "config.json").write_text(json.dumps(document))
    return read_model_config(folder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rotation_equals_transformers(variant: str, tmp_path: Path) -> None:
    parameters = VARIANTS[variant]
    config = read(tmp_path, rope_parameters=parameters)
    theirs = LlamaRotaryEmbedding(LlamaConfig(**SHAPE, rope_parameters=dict(parameters)))
    assert torch.equal(config.rope.frequencies(HEAD_DIM), theirs.inv_freq)
    cos, sin = theirs(torch.zeros(()), POSITIONS[None])
    rotation = RotaryEmbedding(config.rope, HEAD_DIM, torch.float32, torch.device("cpu"))(POSITIONS)
    torch.testing.assert_close(rotation.cos[:, 0], cos[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(rotation.sin[:, 0], sin[0, :, : HEAD_DIM // 2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotated_heads_equal_transformers(dtype: torch.dtype) -> None:
    q = torch.randn(len(POSITIONS), 3, HEAD_DIM).to(dtype)
    rotation = RotaryEmbedding(DefaultRope(), HEAD_DIM, dtype, torch.device("cpu"))(POSITIONS)
    out = torch.empty_like(q)
    rotation.write(q, slice(None), out)
    cos, sin = LlamaRotaryEmbedding(LlamaConfig(**SHAPE))(q, POSITIONS[None])
    theirs, _ = apply_rotary_pos_emb(q[None], q[None], cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(out, theirs[0], rtol=0, atol=1e-6 if dtype == torch.float32 else 0.05)


@given(start=st.integers(0, 100_000), distance=st.integers(0, 1000), shift=st.integers(0, 10_000))
def test_scores_depend_on_distance_alone(start: int, distance: int, shift: int) -> None:
    rotary = RotaryEmbedding(DefaultRope(), 32, torch.float64, torch.device("cpu"))
    x = torch.linspace(-1, 1, 64, dtype=torch.float64).view(2, 1, 32)

    def score(first: int) -> torch.Tensor:
        out = torch.empty_like(x)
        rotary(torch.tensor([first, first + distance])).write(x, slice(None), out)
        torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))  # a rotation keeps lengths
        return (out[0] * out[1]).sum()

    # Angles are fp32, as the checkpoints were trained: 0.01 radians are lost at position 100,000.
    torch.testing.assert_close(score(start), score(start + shift), rtol=0, atol=0.05)


@pytest.mark.parametrize("variant", VARIANTS)
def test_old_spelling_means_the_same(variant: str, tmp_path: Path) -> None:
    parameters = dict(VARIANTS[variant])
    new = read(tmp_path, rope_parameters=parameters)
    theta, kind = parameters.pop("rope_theta"), parameters.pop("rope_type")
    assert read(tmp_path, rope_theta=theta, rope_scaling={"type": kind, **parameters}) == new
    assert read(tmp_path, rope_theta=theta, rope_scaling={"rope_type": kind, **parameters}) == new


def test_defaults(tmp_path: Path) -> None:
    assert read(tmp_path).rope == DefaultRope(10_000.0)
    assert read(tmp_path, rope_theta=5e5, rope_scaling=None).rope == DefaultRope(5e5)


def test_top_level_original_length_wins(tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    config = read(tmp_path, rope_scaling=scaling, original_max_position_embeddings=2048)
    assert (
        config.rope == read(tmp_path, rope_scaling=scaling | {"original_max_position_embeddings": 2048}).rope
    )


@pytest.mark.parametrize(
    ("scaling", "max_position"),
    [
        (None, 32_768),
        ({"type": "linear", "factor": 4.0}, 131_072),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}, 131_072),
        ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096}, 32_768),
        (LLAMA3, 32_768),
    ],
)
def test_longest_context(scaling: dict[str, Any] | None, max_position: int, tmp_path: Path) -> None:
    assert read(tmp_path, rope_scaling=scaling).max_position == max_position


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "'longrope' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "'factor' is missing"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "'factor' must be a number, not '4'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'low_freq_factor' is missing"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one set for all layers"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rotated in part"),
        ({"partial_rotary_factor": 0.5}, "rotated in part"),
    ],
)
def test_what_is_not_served_is_refused_in_one_line(config: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message) as refused:
        read(tmp_path, **config)
    assert "config.json" in str(refused.value)
    assert "\n" not in str(refused.value)
