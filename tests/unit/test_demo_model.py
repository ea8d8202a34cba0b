"""The committed demo model: its files fit together, and it recalls facts planted in its own prompt."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).resolve().parents[2] / "models/demo"


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / "facts.json").read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def tokens_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def test_weights_are_small_and_of_the_configured_shape() -> None:
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert (FOLDER / "model.safetensors").stat().st_size <= 12 * 2**20
    with safe_open(FOLDER / "model.safetensors", framework="pt") as weights:
        embedding = weights.get_slice("model.embed_tokens.weight")
        assert embedding.get_shape() == [config["vocab_size"], config["hidden_size"]]
        assert embedding.get_dtype() == "BF16"
        assert len(weights.keys()) == 9 * config["num_hidden_layers"] + 3


def test_prompt_is_long_and_survives_the_tokenizer(tokenizer: Tokenizer) -> None:
    prompt = (FOLDER / "prompt.txt").read_text(encoding="utf-8")
    assert len(prompt.encode()) <= 64 * 2**10
    ids = tokens_of(tokenizer, prompt)
    assert len(ids) >= 6_000
    assert tokenizer.decode(ids) == prompt


def test_every_fact_word_is_one_token_wherever_it_stands(tokenizer: Tokenizer, facts: dict[str, Any]) -> None:
    assert not set(facts["names"]) & set(facts["values"])
    for name, value in zip(facts["names"], facts["values"], strict=True):
        question = tokens_of(tokenizer, facts["question_template"].format(name=name))
        answer = tokens_of(tokenizer, facts["answer_template"].format(value=value))
        statement = tokens_of(tokenizer, facts["fact_template"].format(name=name, value=value))
        assert len(answer) == 1
        assert statement[: len(question) + 1] == question + answer


def test_planted_facts_are_recalled(facts: dict[str, Any]) -> None:
    words = (FOLDER / "prompt.txt").read_text(encoding="utf-8").split(" ")[:300]
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    rng = random.Random(0)
    right = 0
    for _ in range(20):
        name, value = rng.choice(facts["names"]), rng.choice(facts["values"])
        at = rng.randrange(1, len(words))
        fact = facts["fact_template"].format(name=name, value=value)
        question = facts["question_template"].format(name=name)
        text = f"{' '.join(words[:at])}{fact} {' '.join(words[at:])}{question}"
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.inference_mode():
            best = int(model(ids).logits[0, -1].argmax())
        right += tokenizer.decode([best]) == facts["answer_template"].format(value=value)
    assert right >= 18


def test_prose_is_read_no_worse_behind_more_of_it() -> None:
    """Else what attention shows could not be compared: less of the text would look better than all of it."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    ids = tokenizer((FOLDER / "prompt.txt").read_text(encoding="utf-8"), return_tensors="pt").input_ids
    scored = 1_024
    losses = []
    for context in (512, 8_192):
        text = ids[:, -scored - context :]
        with torch.inference_mode():
            logits = model(text).logits[0, -scored - 1 : -1]
        losses.append(float(cross_entropy(logits, text[0, -scored:])))
    near, far = losses
    assert far < near + math.log(1.02)
