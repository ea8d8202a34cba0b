"""Planted facts: a long text with one invented fact in it, and the question for it at the end. Pure."""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FactBook:
    """The words and templates of a model folder's facts.json."""

    names: tuple[str, ...]
    """What facts are about."""
    values: tuple[str, ...]
    """What they say."""
    fact_template: str
    """With {name} and {value}."""
    question_template: str
    """With {name}; the model goes on with the value."""


@dataclass(frozen=True)
class Task:
    """A prompt whose answer is known."""

    prompt: str
    """Text, fact inside, question at the end."""
    fact: str
    """The fact as it stands in the prompt."""
    question: str
    """The end of the prompt."""
    expected: str
    """The right answer."""
    position: int
    """Where the fact stands, in characters."""


def load_facts(path: Path) -> FactBook:
    """Reads facts.json.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not such a file.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    try:
        return FactBook(
            tuple(record["names"]),
            tuple(record["values"]),
            record["fact_template"],
            record["question_template"],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no facts file: {error!r}") from error


def plant(text: str, book: FactBook, rng: random.Random) -> Task:
    """Draws a fact that the text does not mention and puts it where a word begins."""
    name = rng.choice([one for one in book.names if not _mentions(text, one)])
    value = rng.choice([one for one in book.values if not _mentions(text, one)])
    fact = book.fact_template.format(name=name, value=value)
    question = book.question_template.format(name=name)
    # Templates begin with a space, so a fact fits before any other.
    position = rng.choice([match.start() for match in re.finditer(" ", text)])
    prompt = text[:position] + fact + text[position:] + question
    return Task(prompt, fact, question, value, position)


def _mentions(text: str, word: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


def is_right(answer: str, expected: str) -> bool:
    """Whether the first word of the answer is the expected one."""
    words = re.findall(r"\w+", answer)
    return bool(words) and words[0] == expected
