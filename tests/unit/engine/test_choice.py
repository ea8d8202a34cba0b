"""Drawing for a batch of choices: log probabilities, edits of some rows, ends; one row never changes another."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sps2.internal.v1.prefill_service_pb2 import TokenChoice
from sps2.v1 import generation_pb2
from sps2.v1.generation_pb2 import SamplingSpec
from sps2_engine.choice import ChoiceState, Drawn, draw_tokens
from sps2_engine.sampler import NonFiniteLogitsError

VOCAB = 50
CPU = torch.device("cpu")


def wire(sampling: dict[str, Any] | None = None, **fields: Any) -> TokenChoice:
    values: dict[str, Any] = {"sampling": SamplingSpec(top_p=1, **(sampling or {})), "max_tokens": 20}
    return TokenChoice(**values | fields)


def state(choice: TokenChoice, index: int = 0, outputs: tuple[int, ...] = ()) -> ChoiceState:
    result = ChoiceState(choice, index, 7, CPU)
    for token in outputs:
        result.take(token)
    return result


def logits_of(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


CHOICES = st.builds(
    wire,
    st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.0, 0.7, 1.5]),
            "top_k": st.sampled_from([-1, 3]),
            "min_p": st.sampled_from([0.0, 0.05]),
            "repetition_penalty": st.sampled_from([1.0, 1.5]),
            "frequency_penalty": st.sampled_from([0.0, 1.0]),
            "logit_bias": st.sampled_from([{}, {3: 9.0}]),
            "seed": st.integers(0, 2**64 - 1),
        }
    ),
    num_logprobs=st.sampled_from([None, 0, 5]),
    min_tokens=st.integers(0, 3),
    stop_token_ids=st.sampled_from([[], [1, 2]]),
    prompt_token_ids=st.just([5, 9, 11]),
)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(CHOICES, st.integers(0, 4), st.lists(st.integers(0, VOCAB - 1), max_size=4).map(tuple)),
        min_size=1,
        max_size=5,
    )
)
def test_a_choice_is_drawn_alike_in_every_batch(rows: list[tuple[TokenChoice, int, tuple[int, ...]]]) -> None:
    logits = logits_of(len(rows))
    alone = [draw_tokens(logits[[i]], [state(*row)])[0] for i, row in enumerate(rows)]
    together = draw_tokens(logits.clone(), [state(*row) for row in rows])
    for one, other in zip(alone, together, strict=True):
        assert isinstance(one, Drawn)
        assert isinstance(other, Drawn)
        assert one.token_id == other.token_id
        assert (one.logprobs is None) == (other.logprobs is None)
        if one.logprobs is not None and other.logprobs is not None:
            assert one.logprobs.top_ids == other.logprobs.top_ids
            assert one.logprobs.logprob == pytest.approx(other.logprobs.logprob, abs=1e-5)


def test_logprobs_are_the_models_own() -> None:
    """Neither edits nor temperature change them."""
    logits = logits_of(1)
    expected = logits[0].log_softmax(dim=-1)
    choice = wire(
        {"temperature": 0.3, "logit_bias": {4: 100.0}, "seed": 3}, num_logprobs=20, stop_token_ids=[4]
    )
    (drawn,) = draw_tokens(logits.clone(), [state(choice)])
    assert isinstance(drawn, Drawn)
    assert drawn.token_id == 4
    assert drawn.logprobs is not None
    assert drawn.logprobs.logprob == pytest.approx(float(expected[4]), abs=1e-5)
    top = expected.topk(20)
    assert list(drawn.logprobs.top_ids) == top.indices.tolist()
    assert drawn.logprobs.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-5)


def test_logprobs_of_the_whole_vocabulary_sum_to_one() -> None:
    (drawn,) = draw_tokens(logits_of(1), [state(wire(num_logprobs=VOCAB))])
    assert isinstance(drawn, Drawn)
    assert drawn.logprobs is not None
    assert sum(map(math.exp, drawn.logprobs.top_logprobs)) == pytest.approx(1, abs=1e-5)
    assert drawn.logprobs.logprob == drawn.logprobs.top_logprobs[0]  # greedy


def test_ties_come_by_id() -> None:
    (drawn,) = draw_tokens(torch.zeros(1, VOCAB), [state(wire(num_logprobs=VOCAB))])
    assert isinstance(drawn, Drawn)
    assert drawn.logprobs is not None
    assert drawn.logprobs.top_ids == tuple(range(VOCAB))


def test_a_broken_row_fails_alone_also_under_a_ban() -> None:
    logits = logits_of(3)
    logits[1, 9] = math.nan
    choices = [state(wire(stop_token_ids=[9], min_tokens=2, num_logprobs=2)) for _ in range(3)]
    first, failed, last = draw_tokens(logits, choices)
    assert isinstance(failed, NonFiniteLogitsError)
    assert isinstance(first, Drawn)
    assert isinstance(last, Drawn)


def test_stop_tokens_are_not_drawn_before_min_tokens() -> None:
    logits = torch.zeros(VOCAB)
    logits[9] = 50.0
    one = state(wire(stop_token_ids=[9], min_tokens=3))
    drawn, reason = [], generation_pb2.FINISH_REASON_UNSPECIFIED
    while not reason:
        (token,) = draw_tokens(logits.clone()[None], [one])
        assert isinstance(token, Drawn)
        drawn.append(token.token_id)
        reason = one.take(token.token_id)
    assert (drawn, reason) == ([0, 0, 0, 9], generation_pb2.FINISH_REASON_STOP)


def test_a_choice_alone_is_that_of_the_request_with_several() -> None:
    logits = torch.zeros(1, 1_000_000)
    several = wire({"temperature": 1.0, "seed": 5}, num_choices=3)
    for index in range(3):
        alone = wire({"temperature": 1.0, "seed": 5, "first_choice": index})
        assert draw_tokens(logits.clone(), [state(several, index)]) == draw_tokens(logits, [state(alone)])


def test_max_tokens_end_it() -> None:
    one = state(wire(max_tokens=2))
    assert one.take(3) == generation_pb2.FINISH_REASON_UNSPECIFIED
    assert one.take(3) == generation_pb2.FINISH_REASON_LENGTH
