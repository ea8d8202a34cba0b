"""Training rows: bare symbol pairs, facts back to back, and prose with facts planted between its words.

Every row is determined by the generator it is drawn with. Knows nothing of the model.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from scripts.demo_model.recital import Line, Reciter, Target
from scripts.demo_model.text import BOS, Ints, token_id

TOKENS_PER_FACT = 40  # of a row of prose, at least: facts and questions fill half of it at most


@dataclass(frozen=True)
class Mix:
    """What the rows of a batch hold."""

    length: int
    rows: int
    pairs: float  # share of rows of bare symbol pairs
    dense: float  # share of rows of facts back to back; the rest is prose
    facts: tuple[int, int]  # fewest and most facts or pairs in a row; the logarithm is uniform


class Sampler:
    """Draws rows from one text."""

    def __init__(self, tokenizer: Tokenizer, prose: Ints) -> None:
        self.prose = prose
        self.bos = token_id(tokenizer, BOS)
        self.vocab_size = tokenizer.get_vocab_size()
        self.reciter = Reciter(tokenizer)
        self.word_start: NDArray[np.bool_] = np.zeros(self.vocab_size, dtype=bool)
        for token, index in tokenizer.get_vocab().items():
            self.word_start[index] = token.startswith(("Ġ", "Ċ"))  # a space, a line's end

    def batch(self, rng: np.random.Generator, mix: Mix) -> tuple[Ints, Ints]:
        """Tokens [rows, length + 1], each row opened by the BOS token, and their targets."""
        tokens = np.full((mix.rows, mix.length + 1), self.bos, dtype=np.int64)
        targets = np.full_like(tokens, Target.IGNORE)
        for row in range(mix.rows):
            fewest, most = np.log(mix.facts)
            count = round(float(np.exp(rng.uniform(fewest, most))))
            share = (row + 0.5) / mix.rows
            if share < mix.pairs:
                make = self.pairs_row
            elif share < mix.pairs + mix.dense:
                make = self.dense_row
            else:
                make = self.prose_row
            tokens[row, 1:], targets[row, 1:] = make(rng, mix.length, count)
        return tokens, targets

    def pairs_row(self, rng: np.random.Generator, length: int, count: int) -> tuple[Ints, Ints]:
        """`count` bare pairs of any tokens, each as often as chance has it."""
        symbols = rng.permutation(np.arange(2, self.vocab_size))[: 2 * count]
        which = rng.integers(count, size=length // 2 + 1)
        tokens = np.stack((symbols[:count][which], symbols[count:][which]), axis=1)
        targets = np.full_like(tokens, Target.IGNORE)
        targets[:, 1] = Target.ANSWER
        targets[np.unique(which, return_index=True)[1], 1] = Target.IGNORE  # first statements
        return tokens.reshape(-1)[:length], targets.reshape(-1)[:length]

    def dense_row(self, rng: np.random.Generator, length: int, count: int) -> tuple[Ints, Ints]:
        """Facts and questions back to back."""
        lines = self.reciter.recite(rng, count, asked=length // 2)
        tokens, targets = (np.array([item for line in lines for item in line[part]]) for part in (0, 1))
        return tokens[:length], targets[:length]

    def prose_row(self, rng: np.random.Generator, length: int, count: int) -> tuple[Ints, Ints]:
        """Prose with facts and questions planted in it, half of the time with the questions late."""
        count = max(1, min(count, length // TOKENS_PER_FACT))
        lines = self.reciter.recite(rng, count, asked=2 * count)
        room = length - sum(len(tokens) for tokens, _ in lines)
        prose = self.excerpt(rng, room)
        at = self.spots(rng, prose, len(lines))
        if rng.random() < 0.5:
            late = room - 1 - (room - 1 - at) * rng.random()
            at = np.where(np.arange(len(at)) < count, at, late).astype(np.int64)
        return plant(prose, lines, np.sort(at))

    def excerpt(self, rng: np.random.Generator, length: int) -> Ints:
        """`length` tokens of the text from a random place on."""
        start = int(rng.integers(len(self.prose) - length))
        return self.prose[start : start + length]

    def spots(self, rng: np.random.Generator, prose: Ints, count: int) -> Ints:
        """Random places in the prose at which a word or a paragraph starts."""
        return rng.choice(np.flatnonzero(self.word_start[prose]), size=count)


def plant(prose: Ints, lines: list[Line], at: Ints) -> tuple[Ints, Ints]:
    """The prose with each line set in before the token `at` its place (ascending), and the targets."""
    tokens: list[Ints] = []
    targets: list[Ints] = []
    last = 0
    for where, line in zip(at.tolist(), lines, strict=True):
        tokens += (prose[last:where], np.array(line[0]))
        targets += (np.full(where - last, Target.PROSE), np.array(line[1]))
        last = where
    rest = np.full(len(prose) - last, Target.PROSE)
    return np.concatenate((*tokens, prose[last:])), np.concatenate((*targets, rest))
