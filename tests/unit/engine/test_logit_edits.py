"""Edits of logits against transformers' processors, and against the documented formulas where it has none."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from sps2_engine.logit_edits import BANNED, EditParams, LogitEdits

CPU = torch.device("cpu")
VOCAB = 30
MAX_TOKENS = 40

TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=MAX_TOKENS)
PARAMS = st.builds(
    EditParams,
    bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100, width=32), max_size=5),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.3, 100.0]),
    presence_penalty=st.sampled_from([-2.0, 0.0, 0.7]),
    frequency_penalty=st.sampled_from([-0.3, 0.0, 2.0]),
    banned_ids=st.lists(st.integers(0, VOCAB - 1), max_size=3, unique=True).map(tuple),
    min_tokens=st.integers(0, MAX_TOKENS),
)


def expected(logits: Tensor, params: EditParams, prompt: list[int], output: list[int]) -> Tensor:
    """transformers' chain; OpenAI's two penalties stand between repetition and the ban."""
    ids: Any = torch.tensor([prompt + output])
    scores: Any = logits[None].clone()
    if params.bias:
        biases: Any = {(token,): bias for token, bias in params.bias.items()}
        scores = SequenceBiasLogitsProcessor(biases)(ids, scores)
    if params.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    for token, count in Counter(output).items():
        scores[0, token] -= count * params.frequency_penalty
        scores[0, token] -= params.presence_penalty
    if params.banned_ids and params.min_tokens:
        ban: Any = MinNewTokensLengthLogitsProcessor
        scores = ban(len(prompt), params.min_tokens, list(params.banned_ids), device="cpu")(ids, scores)
    result: Tensor = scores[0].masked_fill(scores[0] == -math.inf, BANNED)
    return result


@settings(max_examples=150, deadline=None)
@given(params=PARAMS, prompt=TOKENS, output=st.lists(st.integers(0, VOCAB - 1), max_size=MAX_TOKENS))
def test_edits_are_those_of_transformers(params: EditParams, prompt: list[int], output: list[int]) -> None:
    """Counted token by token, and applied at each step as a decode would."""
    edits = LogitEdits(params, sorted(set(prompt)), MAX_TOKENS, CPU)
    for step in range(len(output) + 1):
        if step:
            edits.take(output[step - 1])
        logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(step)) * 3
        edited = logits.clone()
        edits.apply(edited)
        torch.testing.assert_close(edited, expected(logits, params, prompt, output[:step]))


def test_defaults_are_idle() -> None:
    assert EditParams().idle
    assert EditParams(banned_ids=(1,)).idle
    assert EditParams(min_tokens=3).idle
    for params in (
        EditParams(bias={0: 1.0}),
        EditParams(repetition_penalty=2),
        EditParams(presence_penalty=1),
        EditParams(frequency_penalty=1),
        EditParams(banned_ids=(1,), min_tokens=1),
    ):
        assert not params.idle


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_edit_makes_a_broken_logit_finite(value: float) -> None:
    params = EditParams(
        bias={1: 5.0}, repetition_penalty=2, frequency_penalty=1, banned_ids=(1,), min_tokens=2
    )
    edits = LogitEdits(params, [1], 4, CPU)
    edits.take(1)
    logits = torch.zeros(4)
    logits[1] = value
    edits.apply(logits)
    assert not logits[1].isfinite()
    assert logits[[0, 2, 3]].isfinite().all()
