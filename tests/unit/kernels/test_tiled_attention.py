"""The tiled bf16 form of segment attention against fp64."""

import logging

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from sps2_engine.runtime.device import use_compile_cache
from sps2_kernels import segment_attention as forms
from sps2_kernels import tiled_attention as tiled
from sps2_kernels.segment_attention import UNMASKED, segment_attention
from sps2_kernels.tiled_attention import EDGE_KEYS, KEYS, ROWS, compiled_passes, tiled_attention

TOLERANCE = 0.008
"""Norm of the error by norm of the output, fp64 being exact; 0.005 is usual, torch's own bf16 operator has 0.002."""
LSE_TOLERANCE = 0.02


@pytest.fixture(autouse=True)
def passes() -> None:
    """Compiled once for all tests of a run, and kept for the next."""
    use_compile_cache()
    assert compiled_passes() is not None, "the tests need a C++ compiler"


def reference(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """fp64, with a plain mask."""
    fold = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(fold, dim=1).double() for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[1:], dtype=torch.bool).tril(), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1).T


def check(q: Tensor, k: Tensor, v: Tensor, causal: bool, tolerance: float = TOLERANCE) -> None:
    """`tiled_attention` is within the stated tolerance."""
    scale = q.shape[2] ** -0.5
    o, lse = tiled_attention(q, k, v, causal, scale)
    exact_o, exact_lse = reference(q, k, v, causal, scale)
    assert (o.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert (o - exact_o).norm() <= tolerance * exact_o.norm()
    torch.testing.assert_close(lse.double(), exact_lse, rtol=tolerance, atol=LSE_TOLERANCE)


def draw(
    num_queries: int, num_keys: int, q_heads: int, kv_heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_queries + num_keys)
    shapes = ((num_queries, q_heads), (num_keys, kv_heads), (num_keys, kv_heads))
    q, k, v = (torch.randn(*shape, head_dim, generator=generator).bfloat16() for shape in shapes)
    return q, k, v


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "q_heads", "kv_heads", "head_dim"),
    [
        (1, 1, 1, 1, 64),
        (ROWS // 4, KEYS, 4, 1, 64),
        (ROWS + 1, KEYS + EDGE_KEYS + 1, 2, 2, 32),
        (75, 2 * KEYS - 1, 14, 2, 64),  # seven heads: tiles end inside a query
        (130, 300, 8, 1, 128),
    ],
)
def test_rectangles(num_queries: int, num_keys: int, q_heads: int, kv_heads: int, head_dim: int) -> None:
    check(*draw(num_queries, num_keys, q_heads, kv_heads, head_dim), causal=False)


@pytest.mark.parametrize(
    ("num_tokens", "q_heads", "kv_heads"), [(1, 4, 1), (700, 8, 2), (1500, 7, 1), (1100, 2, 2)]
)
def test_causal(num_tokens: int, q_heads: int, kv_heads: int) -> None:
    check(*draw(num_tokens, num_tokens, q_heads, kv_heads, 64), causal=True)


def test_dilated_views() -> None:
    q, k, v = draw(1300, 2600, 4, 2, 64)
    check(q[1::2], k[3::4], v[3::4], causal=False)
    check(q[::2], k[::4], v[::4], causal=True)


@pytest.mark.parametrize("factor", [1e4, -1e4])
def test_extreme_scores_stay_finite(factor: float) -> None:
    q, k, v = draw(300, 1500, 4, 2, 64)
    o, lse = tiled_attention(q * factor, k, v, False, 1.0)
    assert o.isfinite().all()
    assert lse.isfinite().all()


def test_equal_keys_give_the_mean_and_values_of_one_give_one() -> None:
    q, k, v = draw(300, 1500, 4, 2, 64)
    o, lse = tiled_attention(q, torch.zeros_like(k), torch.ones_like(v), True, 1.0)
    torch.testing.assert_close(o, torch.ones_like(o), rtol=0, atol=0.01)
    expected = torch.arange(1, 301).log()[:, None].expand(-1, 4)
    torch.testing.assert_close(lse, expected, rtol=0, atol=1e-4)


def test_later_keys_do_not_touch_earlier_outputs() -> None:
    q, k, v = draw(700, 700, 4, 2, 64)
    before = tiled_attention(q, k, v, True, 0.125)
    k[500:], v[500:] = 9.0, float("nan")
    after = tiled_attention(q, k, v, True, 0.125)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[:256], other[:256])


def test_segments_take_the_form_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def form(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        calls.append(len(q))
        return tiled_attention(q, k, v, causal, scale)

    monkeypatch.setattr(tiled, "has_bf16_products", lambda: True)
    monkeypatch.setattr(tiled, "has_tile_products", lambda: False)
    monkeypatch.setattr(forms, "tiled_attention", form)
    q, k, v = draw(600, 900, 4, 2, 64)
    o, lse = segment_attention(q, k, v, 300, 0.125)
    assert calls == [600, 600]  # the rectangle and the triangle
    exact_o, exact_lse = segment_attention(q.float(), k.float(), v.float(), 300, 0.125)
    assert (o.float() - exact_o).norm() < TOLERANCE * exact_o.norm()
    torch.testing.assert_close(lse, exact_lse, rtol=0, atol=LSE_TOLERANCE)
    segment_attention(q[:10], k, v, UNMASKED, 0.125)
    segment_attention(q, k[:10], v[:10], UNMASKED, 0.125)
    empty_o, empty_lse = segment_attention(q, k[:0], v[:0], UNMASKED, 0.125)
    assert len(calls) == 2
    assert not empty_o.any()
    assert empty_lse.isneginf().all()


def test_with_amx_the_flash_operator_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "has_bf16_products", lambda: True)
    monkeypatch.setattr(tiled, "has_tile_products", lambda: True)
    assert not tiled.has_tiles(torch.bfloat16, torch.device("cpu"))


def test_without_a_compiler_the_flash_operator_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_args: object, **_options: object) -> object:
        def broken(*_tensors: Tensor) -> Tensor:
            raise BackendCompilerFailed(fail, RuntimeError("no compiler"), None)

        return broken

    monkeypatch.setattr(torch, "compile", fail)
    with caplog.at_level(logging.WARNING):
        assert compiled_passes.__wrapped__() is None
    assert "flash" in caplog.text
    monkeypatch.setattr(tiled, "has_bf16_products", lambda: True)
    monkeypatch.setattr(tiled, "has_tile_products", lambda: False)
    monkeypatch.setattr(tiled, "compiled_passes", lambda: None)
    q, k, v = draw(600, 600, 4, 2, 64)
    o, _ = segment_attention(q, k, v, 0, 0.125)
    assert (o - reference(q, k, v, True, 0.125)[0]).norm() < TOLERANCE * o.norm()
