"""The words and templates of a model folder's facts.json, as tokens."""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer


class FactsError(ValueError):
    """The model folder has no facts that this evaluation can plant."""


class FactBook:
    """Facts bind a name to a value, each one token; a chain asks for the value of a name's value.

    Args:
        folder: of the model, with facts.json.
        tokenizer: of the model.

    Raises:
        FactsError: no such file, not all templates in it, or words that are not single tokens.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        path = folder / "facts.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            self._fact: str = record["fact_template"]
            self._question: str = record["question_template"]
            self._chain: str = record["chain_question_template"]
            self.names: tuple[str, ...] = tuple(record["names"])
            self.values: tuple[str, ...] = tuple(record["values"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FactsError(f"{path} is no facts file: {error!r}") from error
        for word in (*self.names, *self.values):
            if len(self._encode(f" {word}")) != 1:
                raise FactsError(f"{path}: the word {word!r} is not a single token of this model")

    def word(self, word: str) -> int:
        """The token of a name or value."""
        return self._encode(f" {word}")[0]

    def fact(self, name: str, value: str) -> list[int]:
        """The statement."""
        return self._encode(self._fact.format(name=name, value=value))

    def question(self, name: str) -> list[int]:
        """What the value follows."""
        return self._encode(self._question.format(name=name))

    def chain(self, name: str) -> list[int]:
        """What the value, and then that value's value, follow."""
        return self._encode(self._chain.format(name=name))

    @property
    def longest_question(self) -> int:
        """Tokens of the longest question."""
        questions: Sequence[list[int]] = (self.question(self.names[0]), self.chain(self.names[0]))
        return max(len(question) for question in questions)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
