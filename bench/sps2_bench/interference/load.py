"""The load that every program gets, and a record of when its tokens come. Pure."""

import random
from dataclasses import dataclass

MAX_TOKENS = 8_192
"""Of a decode, which is ended long before."""
STEADY_TOKENS = 24
"""Tokens of each decode before the span that counts begins, and after it has ended."""


@dataclass(frozen=True)
class Load:
    """What is running, and what comes."""

    batch: int
    """Requests that decode."""
    context: int
    """Tokens of their prompts."""
    long: int
    """Tokens of the prompt that arrives."""
    profile: str
    """Attention of that prompt, where pools are apart; the baseline's is dense."""

    @property
    def kv_tokens(self) -> int:
        """Tokens of which a cache must have room, a block to spare for each request."""
        return self.batch * (self.context + MAX_TOKENS + 64) + self.long + 128

    def context_prompt(self, row: int, vocab_size: int) -> list[int]:
        """The prompt of a decode."""
        return random.Random(row).choices(range(vocab_size), k=self.context)

    def long_prompt(self, vocab_size: int) -> list[int]:
        """The prompt that arrives."""
        return random.Random(-1).choices(range(vocab_size), k=self.long)


class Arrivals:
    """When each token of each decode came, in seconds of one clock."""

    def __init__(self, batch: int) -> None:
        self._rows: list[list[float]] = [[] for _ in range(batch)]

    def add(self, row: int, at: float, num_tokens: int = 1) -> None:
        """Tokens of a decode came."""
        self._rows[row].extend([at] * num_tokens)

    @property
    def fewest(self) -> int:
        """Tokens of the decode that has fewest."""
        return min(map(len, self._rows))

    def rows(self) -> tuple[tuple[float, ...], ...]:
        """For each decode when its tokens came, from the time on when all of them had begun."""
        begun = max(row[0] for row in self._rows)
        return tuple(tuple(at for at in row if at >= begun) for row in self._rows)
