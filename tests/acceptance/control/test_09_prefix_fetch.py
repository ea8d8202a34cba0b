"""A turn that comes to another group than its document: KV is fetched, sooner than computed, with the same tokens."""

from statistics import mean

import pytest

from sps2_client import Client, Generation
from sps2_layout.profiles import EXACT
from support.csa_oracle import csa_tokens, long_prompts
from support.deployment import DEMO_MODEL, deployment
from support.identity import GENERATE_TIMEOUT_S, Tally, book_ids
from support.must_show import MustShow
from support.oracle import compare
from support.streams import wait_for_free_kv

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(1800)]

NUM_TOKENS, NUM_DOCUMENTS, NUM_ANSWERED = 6_000, 10, 8
LEAST_FETCHED = 0.8
"""Of the turns; a router that waits for the directory for longer than 20 ms goes on without."""
SOONER = 0.7
"""Time to the first token, at most so many times that of a turn that is computed whole."""


def document(page: int) -> list[int]:
    (text,) = long_prompts([NUM_TOKENS + 1000 * page])
    return list(text[-NUM_TOKENS:])


def ask(client: Client, prompt: list[int]) -> Generation:
    return client.generate(
        token_ids=prompt,
        max_tokens=NUM_ANSWERED,
        ignore_eos=True,
        attention_profile="exact",
        timeout=GENERATE_TIMEOUT_S,
    )


def second_turns(fetch: str, num_ranks: int) -> list[tuple[list[int], Generation]]:
    """The second turn about each document, which round_robin takes to the group that has not seen it."""
    arguments = ["--policy", "round_robin", "--prefix-fetch", fetch]
    turns = []
    with (
        deployment(prefill=f"2x{num_ranks}", decode="1x1", arguments=arguments) as running,
        running.client() as client,
    ):
        for page in range(NUM_DOCUMENTS):
            ask(client, document(page))
            turn = [*document(page), *book_ids()[page : page + 40]]
            turns.append((turn, ask(client, turn)))
        wait_for_free_kv(client)
    return turns


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_cost_model_fetches_and_it_pays(must_show: MustShow, num_ranks: int) -> None:
    with must_show(f"9 prefix of {NUM_TOKENS:,} tokens from another group, prefill 2x{num_ranks}") as figures:
        fetched, computed = second_turns("auto", num_ranks), second_turns("never", num_ranks)
        assert not any(answer.usage.cached_tokens for _, answer in computed)
        hits = [answer for _, answer in fetched if answer.usage.cached_tokens]
        ttft = mean(one.usage.timings.ttft for one in hits) if hits else float("inf")
        ratio = ttft / mean(answer.usage.timings.ttft for _, answer in computed)
        figures.append(f"{len(hits)} of {NUM_DOCUMENTS} turns fetched")
        figures.append(f"TTFT {ratio:.2f}x of computing (at most {SOONER:g}x)")
        tally = Tally()
        for (prompt, one), (_, other) in zip(fetched, computed, strict=True):
            gaps = [float("inf")] * len(one.token_ids)
            if one.token_ids != other.token_ids:
                gaps = csa_tokens(DEMO_MODEL, EXACT, tuple(prompt), NUM_ANSWERED)[1]
            tally.add(compare(one.token_ids, other.token_ids, gaps))
        tally.check()
        assert len(hits) >= LEAST_FETCHED * NUM_DOCUMENTS
        assert ratio <= SOONER
