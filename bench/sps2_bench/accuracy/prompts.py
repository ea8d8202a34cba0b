"""Evaluation prompts: prose with planted facts, what follows it, and questions. Knows nothing of models.

One prompt serves every measurement: its continuation for perplexity, its end for the next-token distribution,
facts restated inside it, and questions that take the place of its last tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sps2_bench.accuracy.facts import FactBook

Ints = NDArray[np.int64]


class TextTooShortError(ValueError):
    """The text holds fewer tokens than one prompt and its continuation."""


@dataclass(frozen=True)
class Question:
    """A question in the place of the prompt's last tokens."""

    tokens: tuple[int, ...]
    """The last `Prompt.suffix` tokens of the prompt, the question at their end."""
    answer: tuple[int, ...]
    """One token for each hop."""
    depth: float
    """Where the (first) fact stands, 0 to 1 of the prompt."""

    @property
    def hops(self) -> int:
        """1, or 2 for a chain."""
        return len(self.answer)


@dataclass(frozen=True)
class Prompt:
    """One prompt."""

    tokens: Ints
    """[S]; ends in prose."""
    continuation: Ints
    """The prose that follows."""
    suffix: int
    """Last tokens of the prompt that a question replaces."""
    questions: tuple[Question, ...]
    repeats: tuple[tuple[int, int], ...]
    """(position, token) of each restated fact: what the token at the position predicts."""


@dataclass(frozen=True)
class Recipe:
    """What prompts are made of."""

    lengths: tuple[int, ...]
    """S of the prompts, which take turns."""
    num_shards: int
    continuation: int
    """Tokens scored after each prompt."""
    num_facts: int
    """One-hop questions of a prompt; half as many chains, as many restated facts."""
    num_prompts: int
    tail: int
    """Restated facts stay out of the tail, which sees everything."""
    seed: int


@dataclass(frozen=True)
class _Line:
    """A planted statement."""

    tokens: list[int]
    at: float
    """Wanted place, 0 to 1 of the prose."""
    role: int = -1
    """Number of the fact whose place is wanted, or -1."""


class PromptMaker:
    """Makes prompt number n of a recipe, the same on every call.

    Args:
        recipe: see there.
        text: token ids of the prose.
        book: facts to plant.
        word_starts: by token id, whether a word or line begins with it.
        bos_id: the token that a text begins with, or None.

    Raises:
        TextTooShortError: see there.
    """

    def __init__(
        self, recipe: Recipe, text: Ints, book: FactBook, word_starts: NDArray[np.bool_], bos_id: int | None
    ) -> None:
        needed = max(recipe.lengths) + recipe.continuation
        if len(text) < needed:
            raise TextTooShortError(
                f"the text has {len(text)} tokens; a prompt and what follows it are {needed}"
            )
        if 5 * recipe.num_facts // 2 > min(len(book.names), len(book.values)):
            raise ValueError(f"{recipe.num_facts} facts of each kind want more words than facts.json has")
        self._recipe = recipe
        self._text = text
        self._book = book
        self._word_starts = word_starts
        self._bos = [] if bos_id is None else [bos_id]

    def make(self, number: int) -> Prompt:
        """Prompt `number` of the recipe, from 0.

        Raises:
            ValueError: the facts do not fit into the prompt.
        """
        recipe = self._recipe
        rng = np.random.default_rng((recipe.seed, number))
        length = recipe.lengths[number % len(recipe.lengths)]
        drawn = _Facts(rng, self._book, recipe, length)
        room = length - len(self._bos) - sum(len(line.tokens) for line in drawn.lines)
        if room < length // 4:
            raise ValueError(f"{len(drawn.lines)} facts leave {room} of {length} tokens for prose")
        prose, continuation = self._window(number, room)
        body, places = self._plant(prose, drawn.lines)
        tokens = np.array([*self._bos, *body], dtype=np.int64)
        suffix = self._book.longest_question
        begins = {role: place + len(self._bos) for role, place in places.items()}
        questions = tuple(
            Question(tuple([*tokens[-suffix:].tolist(), *asked][-suffix:]), answer, begins[role] / length)
            for role, (asked, answer) in enumerate(drawn.questions)
        )
        repeats = tuple(
            (begins[again] + ahead - 1, answer)
            for first, again, ahead, answer in drawn.repeats
            if begins[again] - begins[first] >= -(-length // recipe.num_shards)  # in an earlier shard
        )
        return Prompt(tokens, continuation, suffix, questions, repeats)

    def _window(self, number: int, room: int) -> tuple[Ints, Ints]:
        """Prose of prompt `number` and what follows; windows are spread evenly over the text."""
        last = len(self._text) - room - self._recipe.continuation
        begin = last * number // max(1, self._recipe.num_prompts - 1)
        end = begin + room
        return self._text[begin:end], self._text[end : end + self._recipe.continuation]

    def _plant(self, prose: Ints, lines: Sequence[_Line]) -> tuple[list[int], dict[int, int]]:
        """The prose with each line before a word, and where the lines with a role came to stand."""
        starts = np.flatnonzero(self._word_starts[prose])
        if not len(starts):
            raise ValueError("the text has no words")
        wanted = [min(len(starts) - 1, int(np.searchsorted(starts, line.at * len(prose)))) for line in lines]
        body: list[int] = []
        places: dict[int, int] = {}
        done = 0
        for line, index in sorted(zip(lines, wanted, strict=True), key=lambda pair: pair[1]):
            where = int(starts[index])
            body += prose[done:where].tolist()
            done = where
            if line.role >= 0:
                places[line.role] = len(body)
            body += line.tokens
        return [*body, *prose[done:].tolist()], places


class _Facts:
    """The lines of one prompt, and what is asked about them."""

    def __init__(self, rng: np.random.Generator, book: FactBook, recipe: Recipe, length: int) -> None:
        names = iter(rng.permutation(np.array(book.names)).tolist())
        values = iter(rng.permutation(np.array(book.values)).tolist())
        self.lines: list[_Line] = []
        self.questions: list[tuple[list[int], tuple[int, ...]]] = []
        """Question and answer; their number is the role of their fact's line."""
        self.repeats: list[tuple[int, int, int, int]] = []
        """Roles of the fact and of its restatement, tokens before the value, and the value."""
        # The last part of a prompt is left to prose: there the tail would help, or a question replace
        # the fact. Prose is a quarter of a prompt at least, so this leaves `tail` and a question free.
        end = 1 - 4 * (recipe.tail + 2 * book.longest_question) / length
        if end < 0.5:
            raise ValueError(f"prompts of {length} tokens are too short for a tail of {recipe.tail}")
        for fact in range(recipe.num_facts):
            name, value = next(names), next(values)
            at = end * (fact + rng.random()) / recipe.num_facts  # one in each stretch of the prompt
            self._state(book.fact(name, value), at, asked=True)
            self.questions.append((book.question(name), (book.word(value),)))
        for chain in range(recipe.num_facts // 2):
            name, value, second = next(names), next(values), next(values)
            at = end * (chain + rng.random()) / (recipe.num_facts // 2)
            self._state(book.fact(name, value), at, asked=True)
            self._state(book.fact(value, second), end * rng.random())
            self.questions.append((book.chain(name), (book.word(value), book.word(second))))
        for _ in range(recipe.num_facts):
            self._restate(rng, book, (next(names), next(values)), end, 1.25 / recipe.num_shards)

    def _state(self, tokens: list[int], at: float, *, asked: bool = False) -> None:
        self.lines.append(_Line(tokens, at, len(self.questions) if asked else -1))

    def _restate(
        self, rng: np.random.Generator, book: FactBook, words: tuple[str, str], end: float, least: float
    ) -> None:
        """A fact and, `least` of the prose later or more, the same again.

        A shard and a quarter is wanted, for prose is shorter than its prompt; the maker drops what is nearer.
        """
        distance = least + rng.random() * max(0.0, end - least)
        first = rng.random() * max(0.0, end - distance)
        tokens, answer = book.fact(*words), book.word(words[1])
        role = len(self.questions) + 2 * len(self.repeats)
        self.lines.append(_Line(tokens, first, role))
        self.lines.append(_Line(tokens, first + distance, role + 1))
        self.repeats.append((role, role + 1, tokens.index(answer), answer))
