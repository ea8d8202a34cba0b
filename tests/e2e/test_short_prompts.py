"""Short prompts while long ones are computed: the smoke form of must show 5, which counts order, not time."""

import asyncio
import random

import pytest

from sps2_client import AsyncClient
from support.deployment import LocalDeployment
from support.short_prompts import ask, windows
from support.streams import epochs, wait_for_free_kv

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

LONG = 24_000
SHORT = [50, 80, 110, 300, 500, 64, 65]
BEGIN_S = 20.0


async def test_short_prompts_are_answered_before_the_long_one_that_came_first(demo: LocalDeployment) -> None:
    (long,), shorts = windows([LONG]), windows(SHORT)
    with demo.client() as client:
        in_epochs = epochs(client)
        async with AsyncClient(demo.address) as calls:
            alone = [await ask(calls, prompt) for prompt in shorts]
            seen = len(demo.process.lines)
            answer = asyncio.create_task(ask(calls, long))
            await asyncio.to_thread(
                demo.process.wait_for_line, rf"prefill starts.*\b{LONG}\b", BEGIN_S, after=seen
            )
            beside = await asyncio.gather(*(ask(calls, prompt) for prompt in shorts))
            assert not answer.done(), "they were answered while it was computed"
            assert [one.first_token_id for one in beside] == [one.first_token_id for one in alone]
            await answer
        wait_for_free_kv(client)
        assert epochs(client) == in_epochs


async def test_a_long_prompt_is_given_up_among_short_ones(demo: LocalDeployment) -> None:
    (long,), shorts = windows([LONG], step=101), windows(random.Random(0).choices(SHORT, k=12))
    with demo.client() as client:
        in_epochs = epochs(client)
        async with AsyncClient(demo.address) as calls:
            seen = len(demo.process.lines)
            giving_up = asyncio.create_task(ask(calls, long))
            await asyncio.to_thread(
                demo.process.wait_for_line, rf"prefill starts.*\b{LONG}\b", BEGIN_S, after=seen
            )
            answers = [asyncio.create_task(ask(calls, prompt)) for prompt in shorts]
            await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED)
            giving_up.cancel()
            answers[-1].cancel()
            results = await asyncio.gather(giving_up, *answers, return_exceptions=True)
        cancelled = [isinstance(result, asyncio.CancelledError) for result in results]
        assert cancelled == [True] + [False] * (len(shorts) - 1) + [True]
        wait_for_free_kv(client)
        assert epochs(client) == in_epochs
