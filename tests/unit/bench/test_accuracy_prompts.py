from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from sps2_bench.accuracy.facts import FactBook, FactsError
from sps2_bench.accuracy.prompts import PromptMaker, Recipe, TextTooShortError
from sps2_bench.accuracy.worker import prompt_maker
from support.fact_model import make_fact_model

RECIPE = Recipe((256, 384), num_shards=8, continuation=32, num_facts=3, num_prompts=6, tail=8, seed=1)
BOS = 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fact_model(tmp_path_factory.mktemp("facts"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def maker(folder: Path) -> PromptMaker:
    return prompt_maker(folder, folder / "prompt.txt", RECIPE, BOS)


@pytest.mark.parametrize("number", range(6))
def test_facts_stand_where_they_should(maker: PromptMaker, tokenizer: Tokenizer, number: int) -> None:
    prompt = maker.make(number)
    length = RECIPE.lengths[number % 2]
    tokens = prompt.tokens.tolist()
    assert len(tokens) == length
    assert tokens[0] == BOS
    assert len(prompt.continuation) == RECIPE.continuation
    assert [one.hops for one in prompt.questions] == [1, 1, 1, 2]
    body = tokens[: -prompt.suffix]
    for question in prompt.questions:
        assert len(question.tokens) == prompt.suffix
        name, value = question.tokens[-1], question.answer[0]
        place = body.index(name)
        assert body[place + 1] == value
        assert question.depth == pytest.approx((place - 2) / length)
        assert body.count(name) == 1, "an asked fact is stated once"
        if question.hops == 2:
            pairs = list(pairwise(body))
            assert (value, question.answer[1]) in pairs
    for position, value in prompt.repeats:
        name = tokens[position]
        first = tokens.index(name)
        assert (tokens[first + 1], tokens[position + 1]) == (value, value)
        assert position - first >= length // RECIPE.num_shards
        assert position < length - RECIPE.tail - prompt.suffix


def test_prompts_are_reproducible_and_differ(maker: PromptMaker) -> None:
    assert np.array_equal(maker.make(2).tokens, maker.make(2).tokens)
    assert not np.array_equal(maker.make(2).tokens, maker.make(4).tokens)
    assert maker.make(0).questions == maker.make(0).questions


def test_short_text_is_refused(folder: Path) -> None:
    recipe = Recipe((2000,), 8, 32, 3, 1, 8, 0)
    with pytest.raises(TextTooShortError):
        prompt_maker(folder, folder / "prompt.txt", recipe, BOS)


def test_facts_that_do_not_fit_are_refused(folder: Path) -> None:
    maker = prompt_maker(folder, folder / "prompt.txt", Recipe((64,), 8, 8, 4, 1, 0, 0), BOS)
    with pytest.raises(ValueError, match="for prose"):
        maker.make(0)


def test_words_of_several_tokens_are_refused(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = (folder / "facts.json").read_text().replace("namea", "two words")
    (tmp_path / "facts.json").write_text(text)
    with pytest.raises(FactsError, match="not a single token"):
        FactBook(tmp_path, tokenizer)
    with pytest.raises(FactsError, match="no facts file"):
        FactBook(tmp_path / "nowhere", tokenizer)
