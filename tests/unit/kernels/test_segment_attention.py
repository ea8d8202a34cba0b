"""Segment attention: interpreter == CPU form == fp64 reference, over diagonals, heads, strides and extremes."""

import math

import pytest
import torch
from torch import Tensor

from sps2_kernels import reference
from sps2_kernels.segment_attention import UNMASKED, segment_attention, segment_attention_cpu
from sps2_kernels.shape import HEAD_DIMS
from support.address_space import vast
from support.triton_interpreter import assert_near, interpreted_form

DTYPES = [torch.float32, torch.bfloat16]


def draw(
    num_queries: int, num_keys: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_queries + num_keys)
    shapes = [(num_queries, heads[0]), (num_keys, heads[1]), (num_keys, heads[1])]
    return [torch.randn(*shape, head_dim, generator=generator).to(dtype) for shape in shapes]


def check(inputs: list[Tensor], q_off: int) -> None:
    """Both forms against the reference of the same (rounded) inputs."""
    q, k, v = inputs
    scale = q.shape[2] ** -0.5
    expected_o, expected_lse = reference.segment_attention(q, k, v, q_off, scale)
    for form in (segment_attention_cpu, interpreted_form("segment_attention").segment_attention):
        o, lse = form(q, k, v, q_off, scale)
        assert (o.dtype, lse.dtype, o.shape, lse.shape) == (q.dtype, torch.float32, q.shape, q.shape[:2])
        assert_near(o, expected_o, q.dtype)
        assert_near(lse, expected_lse, q.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_configuration(dtype: torch.dtype, head_dim: int) -> None:
    check(draw(140, 270, (2, 1), head_dim, dtype), 130)


@pytest.mark.parametrize("q_off", [0, 1, 37, 200, UNMASKED, -1, -50, -70, -UNMASKED])
def test_every_kind_of_diagonal(q_off: int) -> None:
    check(draw(70, 150, (2, 2), 32, torch.float32), q_off)


@pytest.mark.parametrize(
    ("num_queries", "num_keys"), [(1, 1), (1, 65), (64, 64), (65, 63), (3, 0), (0, 3), (0, 0)]
)
def test_ragged(num_queries: int, num_keys: int) -> None:
    check(draw(num_queries, num_keys, (1, 1), 32, torch.float32), 0)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)])
def test_grouped_heads(heads: tuple[int, int]) -> None:
    check(draw(20, 90, heads, 64, torch.float32), 70)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dilated_views(dtype: torch.dtype) -> None:
    q, k, v = draw(256, 512, (4, 2), 32, dtype)
    check([q[3::8, 1:3], k[3::8, 1:], v[3::8, 1:]], UNMASKED)


def test_values_of_one_give_one() -> None:
    q, k, v = draw(40, 100, (2, 1), 32, torch.float32)
    for form in (segment_attention_cpu, interpreted_form("segment_attention").segment_attention):
        o, _ = form(q, k, torch.ones_like(v), 60, 0.2)
        torch.testing.assert_close(o, torch.ones_like(o), atol=1e-6, rtol=0)


def test_scores_of_ten_thousand_stay_finite() -> None:
    q, k, v = draw(20, 100, (1, 1), 32, torch.float32)
    q, k = torch.ones_like(q), torch.sign(k[:, :, :1]).expand_as(k).contiguous()  # every score +1e4 or -1e4
    scale = 1e4 / 32
    expected_o, expected_lse = reference.segment_attention(q, k, v, 80, scale)
    for form in (segment_attention_cpu, interpreted_form("segment_attention").segment_attention):
        o, lse = form(q, k, v, 80, scale)
        # The CPU form merges two parts by their log-sum-exp, which near 1e4 has steps of 1e-3.
        torch.testing.assert_close(o.double(), expected_o, rtol=0, atol=1e-3)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=0)


def test_seventy_thousand_equal_keys() -> None:
    q, k, v = (torch.ones(rows, 1, 32, dtype=torch.bfloat16) for rows in (1, 70_000, 70_000))
    for form in (segment_attention_cpu, interpreted_form("segment_attention").segment_attention):
        o, lse = form(q, k, v, UNMASKED, 0.5)
        assert torch.equal(o, torch.ones_like(o))
        assert lse.item() == pytest.approx(16 + math.log(70_000), rel=1e-5)


def test_a_later_key_changes_no_earlier_bit() -> None:
    form = interpreted_form("segment_attention").segment_attention
    q, k, v = draw(96, 96, (1, 1), 32, torch.float32)
    before = form(q, k, v, 0, 0.2)[0][:50].clone()
    k[50] += 3
    v[50] -= 5
    assert torch.equal(form(q, k, v, 0, 0.2)[0][:50], before)


def test_keys_beyond_two_to_the_31() -> None:
    """Rows 2^30 elements apart."""
    stride, num_keys = 1 << 30, 4
    flat = vast((num_keys - 1) * stride + 64, torch.bfloat16)
    k = flat.as_strided((num_keys, 1, 32), (stride, 32, 1))
    q, near, v = draw(3, num_keys, (1, 1), 32, torch.bfloat16)
    k.copy_(near)
    far_o, far_lse = interpreted_form("segment_attention").segment_attention(q, k, v, 1, 0.2)
    o, lse = interpreted_form("segment_attention").segment_attention(q, near, v, 1, 0.2)
    assert torch.equal(far_o, o)
    assert torch.equal(far_lse, lse)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[:, :3], k, v, 0, 1.0), "do not divide"),
        (lambda q, k, v: (q, k, v[:5], 0, 1.0), "do not match"),
        (lambda q, k, v: (q, k.transpose(0, 2).contiguous().transpose(0, 2), v, 0, 1.0), "contiguous"),
        (lambda q, k, v: (q, k, v, 0, 0.0), "positive"),
    ],
)
def test_misuse_is_refused(change, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        segment_attention(*change(*draw(8, 8, (4, 2), 32, torch.float32)))
