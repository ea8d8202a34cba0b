"""Short prompts at a steady rate, alone and beside long ones that never end."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle

from sps2_client import AsyncClient, TextDelta
from support.identity import GENERATE_TIMEOUT_S, Prompt, book_ids

NUM_TOKENS = 4
"""Generated for each."""


@dataclass(frozen=True)
class Answered:
    """A request that is over."""

    ttft_s: float
    """From the call until the first token was here."""
    first_token_id: int
    ended: float
    """On the clock of `time.monotonic`."""


@dataclass(frozen=True)
class Beside:
    """What came of short prompts and of the long ones beside them, in the order of their ends."""

    short: Sequence[Answered]
    long: Sequence[Answered]


def windows(lengths: Sequence[int], step: int = 31) -> list[Prompt]:
    """Prompts of these lengths, each from another place of the demo model's book, which starts again."""
    text = book_ids() * (2 + max(lengths) // len(book_ids()))
    return [text[index * step :][:length] for index, length in enumerate(lengths)]


async def ask(client: AsyncClient, prompt: Prompt) -> Answered:
    """One request to its end."""
    began, first = time.monotonic(), 0.0
    async with client.stream(
        token_ids=prompt,
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
        prefix_reuse="off",
        timeout=GENERATE_TIMEOUT_S,
    ) as stream:
        async for event in stream:
            if isinstance(event, TextDelta):
                first = first or time.monotonic()
        done = await stream.final()
    return Answered(first - began, done.token_ids[0], time.monotonic())


async def steadily(client: AsyncClient, prompts: Sequence[Prompt], interval_s: float) -> list[Answered]:
    """One prompt after another, each at its time, whether or not those before are answered."""
    began, asked = time.monotonic(), []
    for index, prompt in enumerate(prompts):
        await asyncio.sleep(began + index * interval_s - time.monotonic())  # the rate is what is asked for
        asked.append(asyncio.create_task(ask(client, prompt)))
    return list(await asyncio.gather(*asked))


async def beside(
    client: AsyncClient, short: Sequence[Prompt], interval_s: float, long: Sequence[Prompt], at_once: int
) -> Beside:
    """Short prompts at a steady rate, while so many of the long ones are asked for at any time, over and over."""
    answered: list[Answered] = []
    prompts = cycle(long)

    async def one_after_another() -> None:
        while True:
            answered.append(await ask(client, next(prompts)))

    busy = [asyncio.create_task(one_after_another()) for _ in range(at_once)]
    try:
        return Beside(await steadily(client, short, interval_s), answered)
    finally:
        for task in busy:
            task.cancel()
        for task in busy:
            with suppress(asyncio.CancelledError):
                await task
