"""Reading config.json: published shapes, family defaults, and refusals in one clear line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from sps2_engine.models import CheckpointError, ModelConfig, read_model_config
from support.checkpoints import BOS_ID, EOS_ID, FAMILIES, make_tiny_checkpoint


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)


def published(architecture: str, sizes: tuple[int, ...], **rest: Any) -> dict[str, Any]:
    return {"architectures": [architecture], **dict(zip(SIZES, sizes, strict=True)), **rest}


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "Llama-3.1-8B": (
        8_030_261_248,
        published(
            "LlamaForCausalLM",
            (4096, 14_336, 32, 32, 8, 128_256, 131_072),
            rope_theta=500_000.0,
            rope_scaling=LLAMA3_ROPE,
        ),
    ),
    "Yi-6B": (
        6_061_035_520,
        published("LlamaForCausalLM", (4096, 11_008, 32, 32, 4, 64_000, 4096), rope_theta=5_000_000.0),
    ),
    "Mistral-7B-v0.3": (
        7_248_023_552,
        published("MistralForCausalLM", (4096, 14_336, 32, 32, 8, 32_768, 32_768), sliding_window=None),
    ),
    "Qwen2.5-0.5B": (
        494_032_768,
        published(
            "Qwen2ForCausalLM",
            (896, 4864, 24, 14, 2, 151_936, 32_768),
            tie_word_embeddings=True,
            use_sliding_window=False,
            sliding_window=32_768,
            max_window_layers=24,
        ),
    ),
    "Qwen3-8B": (
        8_190_735_360,
        published(
            "Qwen3ForCausalLM",
            (4096, 12_288, 36, 32, 8, 151_936, 40_960),
            head_dim=128,
            rope_theta=1_000_000,
            rope_scaling=None,
            use_sliding_window=False,
            sliding_window=None,
            max_window_layers=36,
        ),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_give_the_published_size(name: str, tmp_path: Path) -> None:
    num_parameters, config = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_model_config(tmp_path).num_parameters == num_parameters


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_num_parameters(family: str, tied: bool, tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path, family, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert read_model_config(tmp_path).num_parameters == sum(p.numel() for p in model.parameters())


WINDOW_ON: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 64, "layer_types": ...}


def rewrite(folder: Path, **changes: Any) -> Path:
    """Changes keys of config.json; the value ... removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return folder


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 4096}),
        ("mistral", {"sliding_window": ...}),  # the family's default is a window
        ("qwen2", {**WINDOW_ON, "max_window_layers": 1}),
        ("qwen3", {**WINDOW_ON, "layer_types": ["full_attention", "sliding_attention"]}),
    ],
)
def test_active_sliding_window_is_refused(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    rewrite(make_tiny_checkpoint(tmp_path, family), **changes)
    with pytest.raises(CheckpointError, match=r"config.json: .* sliding window of \d+ tokens"):
        read_model_config(tmp_path)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 65_536}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 64}),
        ("qwen2", {**WINDOW_ON, "max_window_layers": 2}),
        ("qwen3", {**WINDOW_ON, "max_window_layers": 0, "sliding_window": 65_536}),
        ("qwen3", {**WINDOW_ON, "max_window_layers": 0, "sliding_window": None}),
    ],
)
def test_idle_sliding_window_is_served(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    rewrite(make_tiny_checkpoint(tmp_path, family), **changes)
    assert read_model_config(tmp_path).num_layers == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM'.* not supported; these are: Llama"),
        ({"architectures": ...}, "architecture None is not supported"),
        ({"hidden_size": ...}, "'hidden_size' is missing"),
        ({"hidden_size": "64"}, "'hidden_size' must be a whole number, not '64'"),
        ({"num_hidden_layers": True}, "'num_hidden_layers' must be a whole number"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3"),
        ({"num_attention_heads": 0, "num_key_value_heads": 0, "head_dim": ...}, "config.json: "),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"hidden_act": "gelu"}, "'gelu' is not supported"),
        ({"eos_token_id": "</s>"}, "'eos_token_id' must be a token id"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized weights are not supported"),
    ],
)
def test_config_faults_are_one_clear_line(
    changes: dict[str, Any], message: str, llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    with pytest.raises(CheckpointError, match=message) as refused:
        read_model_config(rewrite(tmp_path, **changes))
    assert "\n" not in str(refused.value)


def test_qwen_layer_types_must_be_known(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path, "qwen3")
    with pytest.raises(CheckpointError, match="'chunked_attention' is not supported"):
        read_model_config(rewrite(tmp_path, layer_types=["full_attention", "chunked_attention"]))


def test_family_defaults_fill_what_old_configs_leave_out(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    rewrite(tmp_path, num_key_value_heads=..., head_dim=..., max_position_embeddings=..., rms_norm_eps=...)
    rewrite(tmp_path, bos_token_id=..., eos_token_id=..., rope_parameters=..., tie_word_embeddings=...)
    config = read_model_config(tmp_path)
    assert (config.num_kv_heads, config.head_dim, config.max_position) == (4, 16, 2048)
    assert (config.bos_id, config.eos_ids) == (1, (2,))


def test_end_tokens_of_the_generation_config_win(llama: Path, tmp_path: Path) -> None:
    assert read_model_config(llama).bos_id == BOS_ID
    assert read_model_config(llama).eos_ids == (EOS_ID,)
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [257, 3]}')
    assert read_model_config(tmp_path).eos_ids == (257, 3)


_JSON = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 200_000),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.one_of(st.none(), st.integers(-1, 9), st.text(max_size=3)), max_size=3),
    st.dictionaries(
        st.sampled_from(["rope_type", "factor", "type"]), st.sampled_from(["yarn", "linear", 0, 2.0])
    ),
)
_KEYS = sorted({key for _, config in PUBLISHED.values() for key in config} | set(LLAMA3_ROPE))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(PUBLISHED)), key=st.sampled_from(_KEYS), value=_JSON, nested=st.booleans())
def test_no_config_fails_in_another_way(
    name: str, key: str, value: Any, nested: bool, tmp_path: Path
) -> None:
    config = PUBLISHED[name][1]
    change = {"rope_scaling": LLAMA3_ROPE | {"rope_type": "yarn", key: value}} if nested else {key: value}
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    try:
        outcome: object = read_model_config(tmp_path)
    except CheckpointError as refused:
        outcome = str(refused)
    assert isinstance(outcome, ModelConfig) or re.fullmatch("[^\n]*config.json[^\n]*", str(outcome))
