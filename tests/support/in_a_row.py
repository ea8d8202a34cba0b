"""Requests one after another: none may see anything of the one before, and decode goes on as prefill would."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from sps2_client import Client
from sps2_layout.profiles import Ladder
from support.csa_oracle import csa_tokens
from support.deployment import LocalDeployment
from support.identity import GENERATE_TIMEOUT_S, Prompt, Tally, reference
from support.oracle import compare

Start = Callable[[], AbstractContextManager[LocalDeployment]]


def check_in_a_row(
    start: Start, folder: Path, ladder: Ladder, prompts: Sequence[Prompt], num_tokens: int, tally: Tally
) -> None:
    """Prompts one after another in one deployment answer as each does in a fresh one, and as one process does.

    Raises:
        AssertionError: tokens differ, and not first at a near-tie.
    """
    with start() as running, running.client() as client:
        in_a_row = [_greedy(client, prompt, num_tokens) for prompt in prompts]
    for prompt, tokens in zip(prompts, in_a_row, strict=True):
        with start() as running, running.client() as client:
            fresh = _greedy(client, prompt, num_tokens)
        expected, gaps = csa_tokens(folder, ladder, prompt, num_tokens)
        tally.add(compare(fresh, expected, gaps))
        tally.add(compare(tokens, fresh, gaps))


def check_a_token_longer(
    client: Client, folder: Path, prompts: Sequence[Prompt], num_tokens: int, tally: Tally
) -> None:
    """A prompt and its first tokens, prefilled together in exact mode, go on as the stream did.

    Raises:
        AssertionError: tokens differ, and not first at a near-tie.
    """
    for prompt in prompts:
        expected, gaps = reference(folder, prompt, num_tokens)
        streamed = _greedy(client, prompt, num_tokens)
        comparison = compare(streamed, expected, gaps)
        tally.add(comparison)
        # What follows a flip has other gaps than the reference's.
        for known in range(1, comparison.num_compared):
            prefilled = _greedy(client, (*prompt, *streamed[:known]), 1)
            tally.add(compare(prefilled, streamed[known : known + 1], gaps[known : known + 1]))


def _greedy(client: Client, prompt: Prompt, num_tokens: int) -> tuple[int, ...]:
    return client.generate(
        token_ids=prompt,
        max_tokens=num_tokens,
        ignore_eos=True,
        prefix_reuse="off",
        timeout=GENERATE_TIMEOUT_S,
    ).token_ids
