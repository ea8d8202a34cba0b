"""Rotation and append: interpreter == CPU form == fp64 reference, and nothing but the named slots changes."""

import pytest
import torch
from torch import Tensor

from sps2_engine.layers.rope import DefaultRope, RotaryEmbedding
from sps2_kernels import reference
from sps2_kernels.rope_append import rope_append, rope_append_cpu
from sps2_kernels.shape import HEAD_DIMS
from support.address_space import vast
from support.triton_interpreter import assert_near, interpreted_form

NUM_SLOTS, CANARY = 130, -77.0


def draw(
    num_tokens: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v as views of one projection, cos and sin."""
    num_q, num_kv = heads
    qkv = torch.randn(num_tokens, num_q + 2 * num_kv, head_dim).to(dtype)
    angles = torch.rand(num_tokens, head_dim // 2) * 6
    q, k, v = torch.split(qkv, [num_q, num_kv, num_kv], dim=1)
    return q, k, v, angles.cos().to(dtype), angles.sin().to(dtype)


def caches(heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    k_cache, v_cache = torch.full((2, NUM_SLOTS, heads[1], head_dim), CANARY, dtype=dtype)
    return k_cache, v_cache


@pytest.mark.parametrize("heads", [(4, 2), (11, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_configuration(dtype: torch.dtype, head_dim: int, heads: tuple[int, int]) -> None:
    inputs = draw(5, heads, head_dim, dtype)
    slots = [64, 3, -1, 129, 0]
    expected_q, held = reference.rope_append(*inputs, slots)
    for form in (rope_append_cpu, interpreted_form("rope_append").rope_append):
        k_cache, v_cache = caches(heads, head_dim, dtype)
        q = form(*inputs, k_cache, v_cache, torch.tensor(slots))
        assert_near(q, expected_q, dtype)
        assert q.dtype == dtype
        for slot in range(NUM_SLOTS):
            if slot in held:
                assert_near(k_cache[slot], held[slot][0], dtype)
                assert torch.equal(v_cache[slot].double(), held[slot][1])
            else:
                assert bool((k_cache[slot] == CANARY).all() and (v_cache[slot] == CANARY).all())


def test_slots_beyond_two_to_the_31() -> None:
    inputs, first = draw(2, (2, 1), 32, torch.bfloat16), (1 << 31) // 32 + 1
    near_k, near_v = torch.zeros(2, 2, 1, 32, dtype=torch.bfloat16)
    k, v = (vast((first + 2) * 32, torch.bfloat16).view(-1, 1, 32) for _ in range(2))
    form = interpreted_form("rope_append").rope_append
    expected = form(*inputs, near_k, near_v, torch.tensor([1, 0]))
    assert torch.equal(form(*inputs, k, v, torch.tensor([first + 1, first])), expected)
    assert torch.equal(k[first:], near_k)
    assert torch.equal(v[first:], near_v)


def test_no_tokens() -> None:
    for form in (rope_append_cpu, interpreted_form("rope_append").rope_append):
        inputs = draw(0, (2, 1), 32, torch.float32)
        assert form(*inputs, *caches((2, 1), 32, torch.float32), torch.empty(0, dtype=torch.int64)).shape == (
            0,
            2,
            32,
        )


def test_equals_the_engines_rotation() -> None:
    q, k, v, _, _ = draw(6, (4, 2), 64, torch.float32)
    rotation = RotaryEmbedding(DefaultRope(), 64, torch.float32, torch.device("cpu"))(torch.arange(100, 106))
    expected = torch.empty_like(q)
    rotation.write(q, slice(0, 6), expected)
    cos, sin = rotation.cos[:, 0, :32], rotation.sin[:, 0]
    actual = rope_append(q, k, v, cos, sin, *caches((4, 2), 64, torch.float32), torch.arange(6))
    torch.testing.assert_close(actual, expected)


def test_mismatched_shapes_are_refused() -> None:
    q, k, v, cos, sin = draw(4, (2, 1), 32, torch.float32)
    cache, slots = caches((2, 1), 32, torch.float32), torch.arange(4)
    with pytest.raises(ValueError, match="do not match"):
        rope_append(q, k, v[:3], cos, sin, *cache, slots)
    with pytest.raises(ValueError, match="4 tokens"):
        rope_append(q, k, v, cos, sin, *cache, slots[:3])


def test_a_cache_of_another_dtype_is_refused() -> None:
    inputs = draw(4, (2, 1), 32, torch.bfloat16)
    with pytest.raises(ValueError, match="but a cache of"):
        interpreted_form("rope_append").rope_append(
            *inputs, *caches((2, 1), 32, torch.float32), torch.arange(4)
        )
