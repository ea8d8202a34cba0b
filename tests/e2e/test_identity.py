"""Greedy tokens are transformers' own and bytes the plans'; the comparison notices a lost KV block."""

from pathlib import Path

import pytest

from sps2_engine.attention.cost_model import Exchange
from support import forgetful
from support.deployment import DEMO_MODEL, LocalDeployment, deployment
from support.identity import Tally, book_prompts, byte_prompts, check_greedy
from support.in_a_row import check_a_token_longer
from support.streams import wait_for_free_kv
from support.traffic import check_bytes

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


def test_demo_model(demo: LocalDeployment) -> None:
    tally = Tally()
    with demo.client() as client:
        check_greedy(client, DEMO_MODEL, book_prompts([1, 7, 500, 2_000]), 32, tally)
        wait_for_free_kv(client)
    tally.check()


def test_decode_goes_on_as_a_prefill_would(demo: LocalDeployment) -> None:
    tally = Tally()
    with demo.client() as client:
        check_a_token_longer(client, DEMO_MODEL, book_prompts([63, 300]), 4, tally)
    tally.check()


def test_odd_heads_on_many_ranks(odd_heads: Path) -> None:
    """The bytes come first: they are counted since the beginning of a deployment."""
    tally, prompts = Tally(), byte_prompts([1, 3, 70, 500])
    exchange: Exchange = "kv"
    arguments = ["--exchange", exchange, "--sharing", "all"]
    with (
        deployment(odd_heads, prefill="1x4", decode="1x3", arguments=arguments) as running,
        running.client() as client,
    ):
        total = check_bytes(client, odd_heads, (4, 3), prompts, 9, exchange)
        check_greedy(client, odd_heads, prompts, 32, tally)
    assert min(total.collective, total.q_exchange, total.kv_transfer) > 0
    tally.check()


def test_a_lost_block_is_noticed(odd_heads: Path) -> None:
    prompts = byte_prompts([500])
    with (
        deployment(odd_heads, "1x1", "1x1", program=forgetful.PROGRAM, env=forgetful.ENV) as running,
        running.client() as client,
        pytest.raises(AssertionError, match="top-2 gap"),
    ):
        check_greedy(client, odd_heads, prompts, 32, Tally())
