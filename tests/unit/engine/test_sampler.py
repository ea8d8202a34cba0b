"""Sampling: the right distribution, the filters of transformers, and draws that depend on nothing else."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from sps2_engine.sampler import NonFiniteLogitsError, SamplingParams, sample_rows

GREEDY = SamplingParams(temperature=0)


def random_logits(rows: int, vocab: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def sample(logits: Tensor, params: SamplingParams, choice: int, position: int) -> int:
    """One row alone."""
    (token,) = sample_rows(logits[None], [params], [choice], [position])
    if isinstance(token, NonFiniteLogitsError):
        raise token
    return token


def draws(logits: Tensor, params: SamplingParams, count: int) -> list[Any]:
    """Tokens at positions 0..count-1 of one text whose logits never change."""
    return sample_rows(logits.expand(count, -1), [params] * count, [0] * count, list(range(count)))


def filtered(logits: Tensor, params: SamplingParams) -> Tensor:
    """The probabilities that transformers would draw from."""
    no_ids: Any = None
    scores = TemperatureLogitsWarper(params.temperature)(no_ids, logits[None])
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(no_ids, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(no_ids, scores)
    if params.min_p:
        scores = MinPLogitsWarper(params.min_p)(no_ids, scores)
    probabilities: Tensor = scores.softmax(dim=-1)[0]
    return probabilities


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=1),
        SamplingParams(temperature=0.5, seed=2),
        SamplingParams(temperature=1.7, seed=3),
        SamplingParams(top_k=5, seed=4),
        SamplingParams(top_k=1000, seed=5),
        SamplingParams(top_p=0.8, seed=6),
        SamplingParams(top_p=0.3, temperature=2.0, seed=7),
        SamplingParams(top_p=0.9, top_k=12, temperature=1.3, seed=8),
        SamplingParams(min_p=0.1, seed=9),
        SamplingParams(min_p=0.05, top_p=0.85, top_k=20, temperature=1.3, seed=10),
        SamplingParams(min_p=0.02, top_p=0.9, temperature=1.5, seed=11),
    ],
)
def test_draws_follow_the_distribution_of_transformers(params: SamplingParams) -> None:
    logits, count = random_logits(1, 40)[0], 4000
    expected = filtered(logits, params).double() * count
    found = torch.bincount(torch.tensor(draws(logits, params, count)), minlength=40).double()
    allowed = expected > 0
    assert found[~allowed].sum() == 0
    chi2 = float(((found - expected)[allowed] ** 2 / expected[allowed]).sum())
    freedom = int(allowed.sum()) - 1
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom) + 5  # beyond five sigma


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocab=st.integers(2, 60),
    coarse=st.booleans(),
    temperature=st.sampled_from([0.3, 1.0, 1.9]),
    top_k=st.integers(0, 70),
    top_p=st.sampled_from([0.01, 0.37, 0.71, 0.93, 1.0]),
    min_p=st.sampled_from([0.0, 0.003, 0.11, 0.7, 1.0]),
)
def test_only_tokens_that_transformers_keeps_are_drawn(
    seed: int, vocab: int, coarse: bool, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = random_logits(1, vocab, seed)[0]
    # Ties, as bf16 models produce. At the border of top-p transformers keeps any of them; top-k keeps all.
    logits = logits.round() if coarse else logits
    params = SamplingParams(temperature, top_p, top_k, seed, min_p)
    kept = filtered(logits, params) > 0
    drawn = set(draws(logits, params, 200))
    if coarse and top_p < 1:
        assert {logits[t].item() for t in drawn} <= set(logits[kept].tolist())
    else:
        assert drawn <= set(kept.nonzero().flatten().tolist())


def test_top_k_keeps_all_ties() -> None:
    logits = torch.tensor([3.0, 1.0, 2.0, 2.0, 2.0, 0.0])
    assert set(draws(logits, SamplingParams(top_k=2), 300)) == {0, 2, 3, 4}


def test_top_p_keeps_the_token_that_reaches_it() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    assert set(draws(logits, SamplingParams(top_p=0.6), 300)) == {0, 1}
    assert set(draws(logits, SamplingParams(top_p=0.45), 300)) == {0}
    assert set(draws(logits, SamplingParams(top_p=1e-9), 50)) == {0}


def test_greedy_is_argmax_whatever_else_is_set() -> None:
    logits = random_logits(20, 500)
    params = [SamplingParams(temperature=0, top_k=3, top_p=0.2, seed=row) for row in range(20)]
    assert sample_rows(logits, params, [0] * 20, [0] * 20) == logits.argmax(dim=-1).tolist()


def test_low_temperature_tends_to_greedy() -> None:
    logits = random_logits(1, 500)[0]
    assert set(draws(logits, SamplingParams(temperature=1e-5), 50)) == {int(logits.argmax())}


_PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.4, 1.0, 2.0]),
    top_p=st.sampled_from([0.2, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 4, 300]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)
_ROWS = st.lists(
    st.tuples(_PARAMS, st.integers(0, 20), st.integers(0, 2**40), st.integers(0, 50)), min_size=1, max_size=8
)


@settings(max_examples=60, deadline=None)
@given(rows=_ROWS, coarse=st.booleans())
def test_a_row_is_drawn_alike_in_every_batch(
    rows: list[tuple[SamplingParams, int, int, int]], coarse: bool
) -> None:
    logits = torch.cat([random_logits(1, 257, seed) for _, _, _, seed in rows])
    logits = logits.round() if coarse else logits
    params, choices, positions, _ = (list(column) for column in zip(*rows, strict=True))
    alone = [sample(*args) for args in zip(logits, params, choices, positions, strict=True)]
    assert sample_rows(logits, params, choices, positions) == alone
    reverse = sample_rows(logits.flip(0), params[::-1], choices[::-1], positions[::-1])
    assert reverse == alone[::-1]


def test_seed_choice_and_position_each_change_the_draw() -> None:
    logits = torch.zeros(1_000_000)

    def draw(seed: int, choice: int, position: int) -> int:
        return sample(logits, SamplingParams(seed=seed), choice, position)

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({draw(1, 2, 3), draw(2, 2, 3), draw(1, 3, 3), draw(1, 2, 4), draw(2, 1, 3)}) == 5


def test_draws_are_pinned() -> None:
    """A new version must continue a text that an old one began."""
    logits = torch.zeros(1000)
    assert draws(logits, SamplingParams(seed=42), 6) == [820, 368, 876, 66, 986, 967]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "params",
    [GREEDY, SamplingParams(), SamplingParams(top_k=2), SamplingParams(top_p=0.5), SamplingParams(min_p=0.5)],
)
def test_a_non_finite_logit_fails_its_row_alone(value: float, params: SamplingParams) -> None:
    logits = random_logits(3, 50)
    expected = sample_rows(logits, [params] * 3, [0] * 3, [5] * 3)
    logits[1, 7] = value
    first, failed, last = sample_rows(logits, [params] * 3, [0] * 3, [5] * 3)
    assert isinstance(failed, NonFiniteLogitsError)
    assert [first, last] == [expected[0], expected[2]]
    with pytest.raises(NonFiniteLogitsError):
        sample(logits[1], params, 0, 5)


@pytest.mark.parametrize(
    "params",
    [SamplingParams(), SamplingParams(top_k=2), SamplingParams(top_p=0.5), SamplingParams(min_p=0.5)],
)
def test_a_row_of_nan_fails_cleanly(params: SamplingParams) -> None:
    with pytest.raises(NonFiniteLogitsError):
        sample(torch.full((9,), math.nan), params, 0, 0)


def test_banned_tokens_are_never_drawn() -> None:
    logits = torch.full((4,), torch.finfo(torch.float32).min)
    logits[2] = -3.0
    for params in (
        GREEDY,
        SamplingParams(temperature=5.0),
        SamplingParams(top_k=4),
        SamplingParams(top_p=0.9),
    ):
        assert Counter(draws(logits, params, 50)) == {2: 50}


def test_logits_are_left_alone() -> None:
    logits = random_logits(2, 30)
    before = logits.clone()
    sample_rows(logits, [SamplingParams(temperature=0.5, top_k=3), SamplingParams(top_p=0.4)], [0, 0], [0, 1])
    assert torch.equal(logits, before)


def test_no_rows() -> None:
    assert sample_rows(torch.empty(0, 10), [], [], []) == []


def test_one_entry_per_row_is_required() -> None:
    with pytest.raises(ValueError, match="one entry per row"):
        sample_rows(torch.zeros(2, 10), [GREEDY], [0, 0], [0, 0])


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"top_k": -1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"min_p": math.nan},
        {"seed": -1},
        {"seed": 2**64},
    ],
)
def test_parameters_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)
