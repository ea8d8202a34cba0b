"""Must show 1, tests 12 and 13 of `attention.md`: what whole requests must not notice, in one process and served."""

from functools import partial

import pytest
import torch

from sps2_engine.attention.csa_schedule import CsaSchedule
from sps2_engine.attention.plan import AttentionPlan
from sps2_engine.collectives import Communicator
from sps2_layout.profiles import DEFAULT, EXACT
from support.csa_cases import ELEMENT_BYTES, HEAD_DIM, PLANS, PROFILES, SCALE, draw, run_plan
from support.csa_oracle import csa_tokens, long_prompts
from support.deployment import DEMO_MODEL, deployment
from support.identity import Tally, book_prompts
from support.in_a_row import check_a_token_longer, check_in_a_row
from support.must_show import MustShow
from support.oracle import compare
from support.ranks import run_ranks

pytestmark = pytest.mark.acceptance

RANKS = 4
PROMPT_TOKENS = (310, 150, 333)
SERVED_LENGTHS = (12_000, 9_000)
"""The second is the beginning of the first: nothing of it may be taken over."""
NUM_TOKENS = 16
LONGER_LENGTHS = (63, 500, 1_600)


def attend_in_a_row(plans: list[AttentionPlan]) -> list[list[torch.Tensor]]:
    """Attention of one prompt after another on the same ranks; by rank."""

    def on_rank(communicator: Communicator) -> list[torch.Tensor]:
        outputs = []
        for plan in plans:
            inputs = draw(plan.layout.num_tokens, plan.num_q_heads, plan.num_kv_heads)
            spans = plan.spans(communicator.rank)
            q, k, v = (torch.cat([x[span.begin : span.end] for span in spans]) for x in inputs)
            outputs.append(CsaSchedule(plan, communicator, SCALE).attend(2, q, k, v))
        return outputs

    return run_ranks(RANKS, on_rank)


@pytest.mark.parametrize("kind", PLANS)
def test_two_in_a_row(must_show: MustShow, kind: str) -> None:
    with must_show(f"1.12 prompts in a row, exchange {kind}") as figures:
        plans = [
            PLANS[kind](profile.resolve(num_tokens), RANKS, 8, 2, HEAD_DIM, ELEMENT_BYTES)
            for profile in PROFILES.values()
            for num_tokens in PROMPT_TOKENS
        ]
        by_rank = attend_in_a_row(plans)
        for index, plan in enumerate(plans):
            fresh = run_plan(plan, 2, draw(plan.layout.num_tokens, 8, 2)).o
            for rank, outputs in enumerate(by_rank):
                expected = torch.cat([fresh[span.begin : span.end] for span in plan.spans(rank)])
                assert torch.equal(outputs[index], expected)
        figures.append(f"{len(plans)} prompts on {RANKS} ranks, each bit-equal to a fresh group")


@pytest.mark.parametrize("prefill", ["1x1", "1x4"])
def test_two_in_a_row_served(must_show: MustShow, prefill: str) -> None:
    with must_show(f"1.12 two prompts in a row, served by {prefill}, `--profile default`") as figures:
        tally = Tally()
        start = partial(deployment, prefill=prefill, arguments=["--profile", "default"])
        check_in_a_row(start, DEMO_MODEL, DEFAULT, long_prompts(SERVED_LENGTHS), NUM_TOKENS, tally)
        figures.append(str(tally))
        tally.check()


def test_a_token_longer(must_show: MustShow) -> None:
    with must_show("1.13 prefill(t) then decode = prefill(t + 1), one process") as figures:
        tally = Tally()
        for prompt in book_prompts(LONGER_LENGTHS):
            tokens, gaps = csa_tokens(DEMO_MODEL, EXACT, prompt, NUM_TOKENS)
            for known in range(1, NUM_TOKENS):
                again, _ = csa_tokens(DEMO_MODEL, EXACT, (*prompt, *tokens[:known]), 1)
                tally.add(compare(again, tokens[known : known + 1], gaps[known : known + 1]))
        figures.append(str(tally))
        tally.check()


@pytest.mark.parametrize(("prefill", "decode"), [("1x1", "1x1"), ("1x3", "1x2")])
def test_a_token_longer_served(must_show: MustShow, prefill: str, decode: str) -> None:
    with must_show(f"1.13 prefill(t) then decode = prefill(t + 1), served by {prefill}, {decode}") as figures:
        tally = Tally()
        with deployment(prefill=prefill, decode=decode) as running, running.client() as client:
            check_a_token_longer(client, DEMO_MODEL, book_prompts(LONGER_LENGTHS), NUM_TOKENS, tally)
        figures.append(str(tally))
        tally.check()
