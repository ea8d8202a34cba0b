"""Must show 5, second half: short prompts wait little for long ones that are computed all the time."""

import random
from collections.abc import Sequence
from statistics import quantiles

import pytest

from sps2_client import AsyncClient
from support.deployment import deployment
from support.must_show import MustShow
from support.short_prompts import Answered, beside, steadily, windows
from support.streams import wait_for_free_kv

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(900)]

LONG = 32_768
NUM_SHORT = 200
INTERVAL_S = 0.5
MOST_TIMES, MORE_S = 2.0, 0.3


def p99(answers: Sequence[Answered]) -> float:
    return quantiles((one.ttft_s for one in answers), n=100)[-1]


@pytest.mark.parametrize("profile", ["default", "exact"])
async def test_short_prompts_beside_long_ones(must_show: MustShow, profile: str) -> None:
    lengths = random.Random(0).choices(range(50, 501), k=NUM_SHORT)
    short, long = windows(lengths), windows([LONG] * 8, step=997)
    with must_show(f"5 short prompts while {LONG:,}-token ones are computed, profile {profile}") as figures:
        with deployment(prefill="1x2", decode="1x2", arguments=["--profile", profile]) as running:
            async with AsyncClient(running.address) as client:
                await steadily(client, short[:20], INTERVAL_S)  # what starts lazily has
                alone = await steadily(client, short, INTERVAL_S)
                both = await beside(client, short, INTERVAL_S, long, at_once=2)
            with running.client() as client:
                wait_for_free_kv(client)
        figures.append(
            f"p99 TTFT alone {p99(alone) * 1000:.0f} ms, beside them {p99(both.short) * 1000:.0f} ms"
        )
        figures.append(f"{len(both.long)} long ones of {LONG:,} tokens meanwhile")
        assert [one.first_token_id for one in both.short] == [one.first_token_id for one in alone]
        assert both.long
        assert p99(both.short) <= MOST_TIMES * p99(alone) + MORE_S
