"""Greedy tokens of a deployment against transformers' own, and how many near-ties may flip (decode.md)."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeAlias

from tokenizers import Tokenizer

from sps2_client import Client
from support.checkpoints import NUM_BYTES
from support.deployment import DEMO_MODEL
from support.oracle import Comparison, compare, oracle_tokens

Prompt: TypeAlias = tuple[int, ...]

TOKENS_PER_FLIP = 10_000
GENERATE_TIMEOUT_S = 300.0


@dataclass
class Tally:
    """Tokens compared so far, and how many comparisons ended in a flip at a near-tie."""

    num_compared: int = 0
    num_flips: int = 0

    def add(self, comparison: Comparison) -> None:
        """Counts one comparison."""
        self.num_compared += comparison.num_compared
        self.num_flips += comparison.flipped

    def check(self) -> None:
        """Fails where more tokens flipped than rounding explains: 1 per 10,000 compared, 1 below that."""
        allowed = max(1, self.num_compared // TOKENS_PER_FLIP)
        assert self.num_flips <= allowed, f"{self}: at most {allowed} may flip"

    def __str__(self) -> str:
        return f"{self.num_compared:,} tokens compared, {self.num_flips} near-tie flips"


@cache
def book_ids() -> Prompt:
    """The demo model's prompt.txt as token ids."""
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    return tuple(tokenizer.encode((DEMO_MODEL / "prompt.txt").read_text(encoding="utf-8")).ids)


def book_prompts(lengths: Iterable[int]) -> list[Prompt]:
    """Prompts for the demo model: the beginning of its book."""
    prompts = [book_ids()[:length] for length in lengths]
    assert [len(prompt) for prompt in prompts] == list(lengths), "prompt.txt is too short"
    return prompts


def byte_prompts(lengths: Iterable[int], seed: int = 0) -> list[Prompt]:
    """Prompts of random bytes, for tiny checkpoints."""
    rng = random.Random(seed)
    return [tuple(rng.randrange(NUM_BYTES) for _ in range(length)) for length in lengths]


@cache
def reference(folder: Path, prompt: Prompt, num_tokens: int) -> tuple[list[int], list[float]]:
    """`oracle_tokens`, computed once for all deployments that are held against it."""
    return oracle_tokens(folder, prompt, num_tokens)


def check_greedy(
    client: Client, folder: Path, prompts: Sequence[Prompt], num_tokens: int, tally: Tally
) -> None:
    """Generates from each prompt and compares every token with transformers'.

    Raises:
        AssertionError: they differ, and not first at a near-tie.
    """
    for prompt in prompts:
        answer = client.generate(
            token_ids=prompt, max_tokens=num_tokens, ignore_eos=True, timeout=GENERATE_TIMEOUT_S
        )
        try:
            tally.add(compare(answer.token_ids, *reference(folder, prompt, num_tokens)))
        except AssertionError as error:
            error.add_note(f"prompt of {len(prompt)} tokens, {folder.name}")
            raise
