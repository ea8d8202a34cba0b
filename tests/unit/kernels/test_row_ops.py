"""Norm, rotation and gate: the compiled form and torch's == fp64; strided rows, none at all, and other dtypes."""

import pytest
import torch
from torch import Tensor

from sps2_kernels import row_ops
from sps2_kernels.row_ops import append_rows, rms_norm, rotate, split_rotated, swiglu

SHAPES = [(0, 2, 16), (1, 1, 16), (3, 5, 64), (700, 4, 96)]
"""Tokens, heads, size; the last are worth threads."""


@pytest.fixture(params=["compiled", "torch"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forms do the same tests."""
    if request.param == "torch":
        monkeypatch.setattr(row_ops, "_library", lambda: None)
    else:
        assert row_ops._library() is not None, "the tests' machine has a compiler"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("shape", SHAPES)
def test_norm(shape: tuple[int, int, int]) -> None:
    tokens, heads, size = shape
    whole, weight = draw(tokens, heads + 1, size), draw(size, seed=1)
    for x in (whole[:, 1:], whole[:, 0]):  # strided heads of a projection, and rows
        wide = x.double()
        expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        close(rms_norm(x, weight, 1e-5), expected)


@pytest.mark.usefixtures("form")
def test_norm_of_zeros_is_zero() -> None:
    assert torch.equal(rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6), torch.zeros(2, 8))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    tokens, heads, size = shape
    x = draw(tokens, heads + 2, size).to(dtype)[:, 1:-1]
    angles = draw(2 * tokens, 1, size // 2, seed=1)[::2]
    cos = torch.cat((angles.cos(), angles.cos()), dim=-1)
    out = torch.empty(2 * tokens, heads, size, dtype=dtype)[::2]
    rotate(x, cos, angles.sin(), out)
    first, second = x.double().chunk(2, dim=-1)
    c, s = angles.double().cos(), angles.double().sin()
    expected = torch.cat((first * c - second * s, second * c + first * s), dim=-1)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_projection_taken_apart(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    tokens, kv_heads, size = shape
    qkv = draw(tokens, 5 * kv_heads * size).to(dtype)
    angles = draw(2 * tokens, 1, size // 2, seed=1)[::2]
    cos, sin = torch.cat((angles.cos(), angles.cos()), dim=-1), angles.sin()
    heads = [3 * kv_heads, kv_heads, kv_heads]
    found = [torch.empty(tokens, count, size, dtype=dtype) for count in heads]
    split_rotated(qkv, cos, sin, *found)
    q, k, v = torch.split(qkv.view(tokens, sum(heads), size), heads, dim=1)
    for part, whole in ((q, found[0]), (k, found[1])):
        expected = torch.empty_like(whole)
        rotate(part, cos, sin, expected)
        assert torch.equal(whole, expected)
    assert torch.equal(found[2], v)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_go_to_their_slots_and_nowhere_else(dtype: torch.dtype) -> None:
    slots = torch.tensor([7, 0, 3])
    k, v = draw(3, 2, 16).to(dtype), draw(3, 2, 16, seed=1).to(dtype)
    k_cache, v_cache = torch.zeros(9, 2, 16, dtype=dtype), torch.zeros(9, 2, 16, dtype=dtype)
    append_rows(k, v, slots, k_cache, v_cache)
    for rows, cache in ((k, k_cache), (v, v_cache)):
        assert torch.equal(cache[slots], rows)
        assert not cache[[1, 2, 4, 5, 6, 8]].any()


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("rows", [0, 1, 7, 400])
def test_gate(rows: int) -> None:
    gate_up = draw(rows, 2 * 150) * 8
    gate, up = gate_up.double().chunk(2, dim=-1)
    close(swiglu(gate_up.clone()), gate / (1 + (-gate).exp()) * up)


@pytest.mark.usefixtures("form")
def test_gate_of_extremes_is_finite_or_not_as_it_should_be() -> None:
    gate = torch.tensor([-1e30, -200.0, -87.0, 0.0, 87.0, 200.0, 1e30, float("nan"), float("inf")])
    found = swiglu(torch.cat((gate, torch.ones(len(gate))))[None])[0]
    assert found[:4].abs().max() < 1e-30
    assert torch.equal(found[4:7], gate[4:7])
    assert found[7].isnan()
    assert found[8].isinf()
