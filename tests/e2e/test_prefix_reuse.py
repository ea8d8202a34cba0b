"""Conversations on a deployment: a later turn computes what is new, and answers as if it had computed everything."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from sps2_client import Client, Generation
from sps2_layout.attention import Attention
from sps2_layout.profile_file import parse_profile
from sps2_layout.profiles import EXACT
from support.csa_oracle import csa_logprobs, csa_tokens, long_prompts
from support.deployment import DEMO_MODEL, LocalDeployment, deployment
from support.faults import Target, Victim
from support.identity import GENERATE_TIMEOUT_S, Prompt, Tally, book_ids
from support.oracle import compare
from support.streams import epochs, wait_for_free_kv
from support.waiting import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

NUM_TOKENS = 12
KV_TOKENS = 2048
"""Of a prefill rank: room for a few of these prompts."""
BLOCK_TOKENS = 64
CACHED_S = 20.0
REFORM_S = 60.0
SMALL = {
    "min_shard_tokens": 64,
    "profiles": [{"shards": 8, "levels": [[1, 1], [8, 8]], "tail": 16, "sinks": 4}],
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalDeployment]:
    """Two prefill ranks with little room, a sparse profile for requests that name none, and one decode rank."""
    profile = tmp_path_factory.mktemp("profiles") / "small.json"
    profile.write_text(json.dumps(SMALL), encoding="utf-8")
    arguments = ["--profile", str(profile), "--kv-tokens", str(KV_TOKENS)]
    with deployment(prefill="1x2", decode="1x1", arguments=arguments) as one:
        yield one


@pytest.fixture
def client(running: LocalDeployment) -> Iterator[Client]:
    with running.client() as one:
        yield one


def document(num_tokens: int, page: int) -> list[int]:
    """A page of the demo model's book that no other test begins with."""
    (text,) = long_prompts([num_tokens + 1000 * page])
    return list(text[-num_tokens:])


def ask(client: Client, prompt: Prompt | list[int], profile: str = "exact", reuse: str = "") -> Generation:
    return client.generate(
        token_ids=prompt,
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
        logprobs=0,
        attention_profile=profile,
        prefix_reuse=reuse,
        timeout=GENERATE_TIMEOUT_S,
    )


def test_a_conversation_computes_only_what_is_new(client: Client) -> None:
    """Exact answers are those of the model, whatever is cached; bytes between ranks fall with the tokens computed."""
    tally, prompt, num_known = Tally(), document(900, page=1), 0
    for turn in range(3):
        answer = ask(client, prompt)
        tally.add(compare(answer.token_ids, *csa_tokens(DEMO_MODEL, EXACT, tuple(prompt), NUM_TOKENS)))
        usage = answer.usage
        assert usage.cached_tokens == num_known // BLOCK_TOKENS * BLOCK_TOKENS
        assert len(prompt) - usage.cached_tokens < len(prompt) - num_known + BLOCK_TOKENS
        if turn:
            alone = ask(client, prompt, reuse="off")
            assert alone.usage.cached_tokens == 0
            assert usage.bytes_moved.collective < 0.5 * alone.usage.bytes_moved.collective
        num_known = len(prompt)
        prompt += [*answer.token_ids, *book_ids()[turn : turn + 40]]
    wait_for_free_kv(client)
    tally.check()


@pytest.mark.parametrize("profile", ["exact", ""])
def test_prompts_part_in_the_middle_of_what_is_kept(client: Client, profile: str) -> None:
    """What each computes itself lies, by its place in the text, where the kept one goes on differently: before its end,
    at its end, behind it. None is answered with the other's KV."""
    kept = document(900, page=20 if profile else 21)
    kept_by = Attention.admit(EXACT if profile else parse_profile("small", json.dumps(SMALL)), len(kept))
    ask(client, kept, profile)
    wait_until(lambda: ask(client, kept, profile).usage.cached_tokens == 896, timeout=CACHED_S)
    for num_shared, num_tokens in ((430, 600), (700, 900), (830, 1200)):
        prompt = [*kept[:num_shared], *document(num_tokens - num_shared, page=22 + num_tokens)]
        answer = ask(client, prompt, profile)
        num_cached = num_shared // BLOCK_TOKENS * BLOCK_TOKENS
        attention = Attention.admit(EXACT, num_tokens) if profile else kept_by.adopting(num_cached)
        assert answer.usage.cached_tokens == num_cached
        expected = csa_logprobs(DEMO_MODEL, attention, [*prompt, *answer.token_ids], NUM_TOKENS)
        assert [one.logprob for one in answer.logprobs] == pytest.approx(expected, abs=2e-3)


def test_a_sparse_prompt_adopts_and_an_exact_one_does_not(client: Client) -> None:
    """The directory may take longer than a prompt waits for it: then the prompt has a mask of its own."""
    prompt = document(800, page=2)
    first = ask(client, prompt, profile="")
    assert first.usage.attention_profile.startswith("small: N=8")
    longer = [*prompt, *first.token_ids, *book_ids()[:50]]
    tries: list[Generation] = []

    def adopted() -> bool:
        tries.append(ask(client, [*longer, len(tries)], profile=""))
        return tries[-1].usage.attention_profile.startswith("adopted: N=8")

    wait_until(adopted, timeout=CACHED_S)
    assert tries[-1].usage.cached_tokens >= 768
    exact = ask(client, longer)
    assert (exact.usage.cached_tokens, exact.usage.attention_profile) == (0, "exact")
    refused = ask(client, longer, profile="", reuse="off")
    assert (refused.usage.cached_tokens, refused.usage.attention_profile[:5]) == (0, "small")


def test_the_same_prompt_twice_at_once(client: Client) -> None:
    """Neither waits for the other; one of what they leave is kept."""
    prompt = document(700, page=3)
    expected = csa_tokens(DEMO_MODEL, EXACT, tuple(prompt), NUM_TOKENS)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: ask(client, prompt), range(2)))
    tally = Tally()
    for answer in (*answers, ask(client, prompt)):
        tally.add(compare(answer.token_ids, *expected))
    tally.check()
    wait_for_free_kv(client)


def test_under_pressure_nothing_fails_and_the_oldest_goes(client: Client) -> None:
    """Prompts for three times the room, one after another: each is served, the last is still cached, the first not."""
    prompts = [document(1500, page=4 + index) for index in range(6)]
    for prompt in prompts:
        ask(client, prompt)
    again = ask(client, prompts[-1])
    assert again.usage.cached_tokens == 1472
    tally = Tally()
    tally.add(compare(again.token_ids, *csa_tokens(DEMO_MODEL, EXACT, tuple(prompts[-1]), NUM_TOKENS)))
    tally.check()
    assert ask(client, prompts[0]).usage.cached_tokens == 0

    def settled() -> bool:
        ranks = [one for one in client.cluster_state().workers if one.role == "prefill"]
        return all(
            0 < one.kv_blocks_cached <= one.kv_blocks_total and one.kv_blocks_used == 0 for one in ranks
        )

    wait_until(settled, timeout=CACHED_S)


def test_a_cancelled_request_leaves_the_cache_as_it_was(client: Client) -> None:
    prompt = document(1100, page=11)
    before = ask(client, prompt)
    longer = [*prompt, *document(400, page=12)]
    with client.stream(
        token_ids=longer,
        max_tokens=400,
        ignore_eos=True,
        attention_profile="exact",
        timeout=GENERATE_TIMEOUT_S,
    ) as stream:
        next(iter(stream))
    wait_for_free_kv(client)
    again = ask(client, prompt)
    assert again.usage.cached_tokens == 1088
    assert again.token_ids == before.token_ids


def test_a_rank_that_dies_takes_the_cache_with_it(running: LocalDeployment, client: Client) -> None:
    """The last test here: the group re-forms, knows nothing, and the directory does not send anybody to it in vain."""
    prompt = document(600, page=13)
    before = ask(client, prompt)
    assert ask(client, prompt).usage.cached_tokens == 576
    in_epochs = epochs(client)
    Target(running).send(Victim("prefill-0/1", "engine"))
    wait_until(lambda: _formed_anew(client, in_epochs), timeout=REFORM_S)
    after = ask(client, prompt)
    assert after.usage.cached_tokens == 0
    assert after.token_ids == before.token_ids
    assert ask(client, prompt).usage.cached_tokens == 576


def _formed_anew(client: Client, before: object) -> bool:
    ranks = [one for one in client.cluster_state().workers if one.role == "prefill"]
    return epochs(client) != before and len(ranks) == 2 and all(one.state == "ready" for one in ranks)
