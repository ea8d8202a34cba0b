"""Merge of partial states: algebra as properties, and interpreter == CPU form == fp64 reference."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sps2_kernels import reference
from sps2_kernels.merge_states import (
    SampledState,
    merge_pair,
    merge_sampled,
    merge_sampled_cpu,
    merge_states,
    merge_states_cpu,
)
from sps2_kernels.shape import HEAD_DIMS
from support.triton_interpreter import assert_near, interpreted_form

NO_STATE = float("-inf")
State = tuple[Tensor, Tensor]


@st.composite
def states(draw: st.DrawFn, num_parts: int = 3) -> State:
    """Parts of 4 tokens and 2 heads, with log-sum-exps of up to ±1e4, some empty."""
    value = st.one_of(st.just(NO_STATE), st.floats(-1e4, 1e4), st.floats(-5, 5))
    values = draw(st.lists(value, min_size=num_parts * 8, max_size=num_parts * 8))
    lse = torch.tensor(values, dtype=torch.float32).view(num_parts, 4, 2)
    o = torch.randn(num_parts, 4, 2, 32, generator=torch.Generator().manual_seed(len(set(values))))
    return o.masked_fill(lse.isneginf()[..., None], 0.0), lse


def assert_same(actual: State, expected: tuple[Tensor, Tensor], dtype: torch.dtype = torch.float32) -> None:
    # Weights come from differences of log-sum-exps, which near 1e4 have steps of 1e-3.
    atol = 2e-3 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual[0].double(), expected[0].double(), rtol=1e-4, atol=atol)
    torch.testing.assert_close(actual[1].double(), expected[1].double(), rtol=1e-6, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(states())
def test_both_forms_equal_the_reference(parts: State) -> None:
    before = parts[0].clone(), parts[1].clone()
    expected = reference.merge_states(*parts)
    assert_same(merge_states_cpu(*parts), expected)
    assert_same(interpreted_form("merge_states").merge_states(*parts), expected)
    assert all(torch.equal(a, b) for a, b in zip(parts, before, strict=True)), "an input was changed"


@settings(max_examples=20, deadline=None)
@given(states(), st.permutations(range(3)))
def test_order_does_not_matter(parts: State, order: list[int]) -> None:
    assert_same(merge_states(parts[0][order], parts[1][order]), merge_states(*parts))


@settings(max_examples=20, deadline=None)
@given(states())
def test_grouping_does_not_matter(parts: State) -> None:
    a, b, c = zip(*parts, strict=True)
    assert_same(merge_pair(*merge_pair(*a, *b), *c), merge_pair(*a, *merge_pair(*b, *c)))
    assert_same(merge_pair(*merge_pair(*a, *b), *c), merge_states(*parts))


@settings(max_examples=20, deadline=None)
@given(states(num_parts=1))
def test_an_empty_state_changes_nothing(part: State) -> None:
    nothing = torch.zeros_like(part[0]), torch.full_like(part[1], NO_STATE)
    both = torch.cat((part[0], nothing[0])), torch.cat((part[1], nothing[1]))
    forms: list[Callable[[Tensor, Tensor], State]] = [
        merge_states_cpu,
        interpreted_form("merge_states").merge_states,
    ]
    for form in forms:
        o, lse = form(*both)
        assert torch.equal(o, part[0][0])
        assert torch.equal(lse, part[1][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_configuration(dtype: torch.dtype, head_dim: int) -> None:
    o, lse = torch.randn(4, 9, 3, head_dim).to(dtype), torch.randn(4, 9, 3)
    expected = reference.merge_states(o, lse)
    for form in (merge_states_cpu, interpreted_form("merge_states").merge_states):
        merged = form(o, lse)
        assert merged[0].dtype == dtype
        assert_near(merged[0], expected[0], dtype)
        assert_near(merged[1], expected[1], torch.float32)


def sampled_parts(o: Tensor, dtype: torch.dtype) -> list[SampledState]:
    """Planes of one flat buffer, as an exchange returns them: overlapping, dilated, some empty."""
    head_dim = o.shape[2]
    places = [(3, 1, 4, 0, 2), (3, 8, 0, 1, 1), (5, 4, 2, 1, 2), (7, 1, 0, 2, 1), (0, 2, 0, 0, 3)]
    flat = torch.randn(sum(rows * heads for rows, _, _, _, heads in places) * head_dim).to(dtype)
    parts, offset = [], 0
    for rows, stride, first, head, heads in places:
        end = offset + rows * heads * head_dim
        lse = torch.randn(rows, heads)
        lse[1:2] = NO_STATE
        plane = flat[offset:end].view(rows, heads, head_dim)
        plane[1:2] = 0
        parts.append(SampledState(plane, lse, first, stride, head))
        offset = end
    return parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_sampled_states_go_to_their_rows_and_heads(dtype: torch.dtype, head_dim: int) -> None:
    o, lse = torch.randn(21, 3, head_dim).to(dtype), torch.randn(21, 3)
    o[6], lse[6] = 0, NO_STATE
    parts = sampled_parts(o, dtype)
    before = o.clone(), lse.clone()
    listed = [(part.o, part.lse, part.first_row, part.stride, part.first_head) for part in parts]
    expected = reference.merge_sampled(o, lse, listed)
    for form in (merge_sampled_cpu, interpreted_form("merge_sampled").merge_sampled):
        merged = form(o, lse, parts)
        assert merged[0].dtype == dtype
        assert_near(merged[0], expected[0], dtype)
        assert_near(merged[1], expected[1], torch.float32)
    assert torch.equal(o, before[0])
    assert torch.equal(lse, before[1])


def test_no_parts_is_identity() -> None:
    o, lse = torch.randn(5, 2, 32), torch.randn(5, 2)
    for form in (merge_sampled_cpu, interpreted_form("merge_sampled").merge_sampled):
        assert all(torch.equal(a, b) for a, b in zip(form(o, lse, []), (o, lse), strict=True))


@pytest.mark.parametrize(("first_row", "stride", "first_head"), [(0, 8, 0), (3, 1, 0), (0, 1, 2)])
def test_a_part_beyond_the_whole_is_refused(first_row: int, stride: int, first_head: int) -> None:
    part = SampledState(torch.zeros(3, 1, 32), torch.zeros(3, 1), first_row, stride, first_head)
    with pytest.raises(ValueError, match="outside"):
        merge_sampled(torch.zeros(5, 2, 32), torch.zeros(5, 2), [part])


def test_a_misaligned_part_is_refused() -> None:
    plane = torch.zeros(3 * 32 + 1)[1:].view(3, 1, 32)
    form = interpreted_form("merge_sampled").merge_sampled
    with pytest.raises(ValueError, match="not aligned"):
        form(torch.zeros(5, 2, 32), torch.zeros(5, 2), [SampledState(plane, torch.zeros(3, 1), 0, 1, 0)])
