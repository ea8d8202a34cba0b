"""What bf16 costs, and where it is taken: resolution, and logits against fp32 on the tiny and demo models."""

from pathlib import Path

import pytest
import torch

from sps2_engine.models import Decoder
from sps2_engine.models.load import load_decoder
from sps2_engine.runtime import device as devices
from sps2_engine.runtime.device import kv_dtype, resolve_dtype, use_compile_cache
from sps2_kernels.segment_attention import segment_attention
from support.checkpoints import FAMILIES, make_tiny_checkpoint
from support.deployment import DEMO_MODEL
from support.identity import book_ids

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NUM_TOKENS = 600
"""Enough for tiles."""


@pytest.fixture(autouse=True)
def cache() -> None:
    """Attention compiles on first use."""
    use_compile_cache()


@pytest.mark.parametrize(("able", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_takes_bf16_where_the_cpu_has_it(
    able: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "has_bf16_products", lambda: able)
    assert resolve_dtype("auto", CPU) == expected
    assert resolve_dtype("auto", CUDA) == "bf16"
    assert [resolve_dtype(name, CPU) for name in ("fp32", "bf16")] == ["fp32", "bf16"]


def test_kv_on_a_cpu_is_fp32() -> None:
    assert [kv_dtype(name, CPU) for name in ("fp32", "bf16")] == ["fp32", "fp32"]
    assert [kv_dtype(name, CUDA) for name in ("fp32", "bf16")] == ["fp32", "bf16"]


def logits_of(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """Logits at every position [tokens, vocab], dense causal attention."""
    scale = decoder.config.head_dim**-0.5
    hidden = decoder.forward(
        ids, torch.arange(len(ids)), lambda _layer, q, k, v: segment_attention(q, k, v, 0, scale)[0]
    )
    return decoder.logits(hidden)


def errors(folder: Path, ids: torch.Tensor) -> tuple[float, float]:
    """Mean error of bf16 logits in standard deviations of the fp32 ones, and the share of changed argmaxes."""
    exact, rounded = (
        logits_of(load_decoder(folder, dtype, CPU), ids) for dtype in (torch.float32, torch.bfloat16)
    )
    assert rounded.dtype == torch.float32
    flips = (exact.argmax(dim=1) != rounded.argmax(dim=1)).float().mean()
    return float((exact - rounded).abs().mean() / exact.std()), float(flips)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_logits_of_tiny_models_are_within_five_percent(family: str, tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path, family)
    error, _ = errors(tmp_path, torch.arange(NUM_TOKENS) * 7 % 250)
    assert error < 0.05  # 0.026: random weights


def test_bf16_logits_of_the_demo_model_are_within_two_percent() -> None:
    error, flips = errors(DEMO_MODEL, torch.tensor(book_ids()[:NUM_TOKENS]))
    assert error < 0.02  # 0.0065
    assert flips < 0.03  # 0.015, each text's beginning being fp32's own: no flip carries over
