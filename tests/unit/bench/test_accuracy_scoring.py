"""Suffixes share a prompt's KV: what comes out is what a whole prefill of each text would give."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sps2_bench.accuracy.candidates import EXACT, catalogue, choose
from sps2_bench.accuracy.prompts import Prompt, Question
from sps2_bench.accuracy.scoring import Scorer
from sps2_bench.accuracy.suffix import SuffixAttention, visible_keys
from sps2_bench.csa import make_plan, make_schedule
from sps2_bench.prefill.random_model import DEFAULT_SHAPE, model_config
from sps2_engine.collectives import SoloCommunicator
from sps2_engine.models import Decoder, random_decoder
from sps2_kernels.reference import csa_mask

SHARDS, TAIL, SUFFIX, LENGTH = 8, 5, 3, 128
CATALOGUE = catalogue(SHARDS, TAIL)
LOCAL = choose(["dense-8-sinks"], (LENGTH,), SHARDS, TAIL)[-1]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    shape = {
        **DEFAULT_SHAPE,
        "hidden": 32,
        "intermediate": 48,
        "layers": 3,
        "heads": 4,
        "head_dim": 8,
        "vocab": 50,
    }
    return random_decoder(model_config(shape), 0, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("candidate", [*CATALOGUE.values(), LOCAL], ids=lambda one: one.name)
def test_mask_is_the_oracles(candidate: object) -> None:
    layout = candidate.layout(LENGTH)  # type: ignore[attr-defined]
    levels = [(level.group, level.stride) for level in layout.levels]
    rest = {"dense_queries": layout.dense_queries, "sinks": layout.sinks, "tail": layout.tail}
    everything = torch.arange(LENGTH)
    for layer, kv_head in ((0, 0), (2, 1)):
        expected = csa_mask(LENGTH, layout.shard_tokens, levels, kv_head, layer, **rest)
        assert torch.equal(visible_keys(layout, layer, kv_head, everything, everything), expected)


def whole_prefill(
    decoder: Decoder, name: str, tokens: list[int]
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Logits of every position of a prompt of LENGTH tokens under a profile, and its KV."""
    kv: list[tuple[Tensor, Tensor]] = []
    plan = make_plan(CATALOGUE[name].layout(len(tokens)), 1, decoder.config, torch.float32)
    schedule = make_schedule(plan, SoloCommunicator())

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kv.append((k, v))
        return schedule.attend(layer, q, k, v)

    return decoder.logits(decoder.forward(torch.tensor(tokens), torch.arange(len(tokens)), attend)), kv


@pytest.mark.parametrize("name", [EXACT, "paper", "sampled-2", "dense-4", "dense-8-sinks", "pyramid-sampled"])
def test_scores_are_those_of_whole_prefills(decoder: Decoder, name: str) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(50, size=LENGTH)
    continuation = rng.integers(50, size=4)
    asked = rng.integers(50, size=(5, SUFFIX)).tolist()
    texts = [[*tokens[:-SUFFIX].tolist(), *suffix] for suffix in asked]
    first = [int(whole_prefill(decoder, name, text)[0][-1].argmax()) for text in texts]
    questions = [Question(tuple(suffix), (answer,), 0.5) for suffix, answer in zip(asked, first, strict=True)]
    questions[1] = Question(
        questions[1].tokens, ((first[1] + 1) % 50,), 0.5
    )  # a wrong answer must stay wrong
    prompt = Prompt(tokens, continuation, SUFFIX, tuple(questions), ((70, 7), (90, 9)))
    candidates = [CATALOGUE[EXACT]] + ([CATALOGUE[name]] if name != EXACT else [])
    score = Scorer(decoder).score(prompt, candidates)[name]

    logits, kv = whole_prefill(decoder, name, tokens.tolist())
    exact_end = whole_prefill(decoder, EXACT, tokens.tolist())[0][-1].log_softmax(-1)
    # The continuation sees the whole prompt, densely: one text that begins where the prompt ends.
    going_on = decoder_continues(decoder, kv, continuation.tolist())
    predicted = torch.cat([logits[-1:], going_on[:-1]]).log_softmax(-1)
    expected_nll = float(functional.nll_loss(predicted, torch.from_numpy(continuation), reduction="sum"))
    assert score.nll == pytest.approx(expected_nll, rel=1e-4)
    expected_kl = functional.kl_div(logits[-1].log_softmax(-1), exact_end, reduction="sum", log_target=True)
    assert score.kl == pytest.approx(float(expected_kl), abs=1e-5)
    expected_repeats = functional.cross_entropy(logits[[70, 90]], torch.tensor([7, 9]), reduction="sum")
    assert score.repeat_nll == pytest.approx(float(expected_repeats), rel=1e-4)
    assert score.right == (True, False, True, True, True)


def decoder_continues(decoder: Decoder, kv: list[tuple[Tensor, Tensor]], tokens: list[int]) -> Tensor:
    """Logits of tokens after a prompt, one at a time, as decode computes them: by torch's own attention."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (torch.cat([old, new]) for old, new in zip(kv[layer], (k, v), strict=True))
        kv[layer] = (keys, values)
        q4, k4, v4 = (x.transpose(0, 1)[None] for x in (q, keys, values))
        return functional.scaled_dot_product_attention(q4, k4, v4, enable_gqa=True)[0].transpose(0, 1)

    rows = []
    for step, token in enumerate(tokens):
        rows.append(
            decoder.logits(decoder.forward(torch.tensor([token]), torch.tensor([LENGTH + step]), attend))
        )
    return torch.cat(rows)


def test_chain_needs_both_answers(decoder: Decoder) -> None:
    tokens = np.random.default_rng(3).integers(50, size=LENGTH)
    logits, kv = whole_prefill(decoder, EXACT, tokens.tolist())
    first = int(logits[-1].argmax())
    second = int(decoder_continues(decoder, kv, [first])[0].argmax())
    suffix = tuple(tokens[-SUFFIX:].tolist())
    answers = [(first, second), (first, (second + 1) % 50), ((first + 1) % 50, second)]
    questions = tuple(Question(suffix, answer, 0.0) for answer in answers)
    prompt = Prompt(tokens, tokens[:1], SUFFIX, questions, ())
    score = Scorer(decoder).score(prompt, [CATALOGUE[EXACT]])[EXACT]
    assert score.right == (True, False, False)
    assert (score.repeats, score.kl) == (0, 0.0)


def test_suffix_of_a_whole_shard_is_refused() -> None:
    with pytest.raises(ValueError, match="fill a shard"):
        SuffixAttention(CATALOGUE["paper"].layout(LENGTH), [], LENGTH // SHARDS, 1)
