"""Two prefill groups that serve in turn: what one has cached the other fetches, and the answers are the model's."""

import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from sps2_client import Client, Generation
from sps2_layout.profiles import EXACT
from support.csa_oracle import csa_tokens, long_prompts
from support.deployment import DEMO_MODEL, LocalDeployment, deployment
from support.faults import Target, Victim
from support.identity import GENERATE_TIMEOUT_S, Tally
from support.oracle import compare
from support.streams import wait_for_free_kv
from support.waiting import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

NUM_TOKENS = 8
DOCUMENT = 700
CACHED = 640
"""Tokens of its full blocks."""
TRIES = 10
"""A router that waits for the directory for longer than 20 ms goes on without: then nothing is fetched."""
ANSI = re.compile(r"\x1b\[[0-9;]*m")
SENT = "(prefix is sent)"


@pytest.fixture(scope="module")
def running() -> Iterator[LocalDeployment]:
    arguments = ["--policy", "round_robin", "--prefix-fetch", "always", "--kv-tokens", "32768"]
    with deployment(prefill="2x1", decode="1x1", arguments=arguments) as one:
        yield one


@pytest.fixture
def client(running: LocalDeployment) -> Iterator[Client]:
    with running.client() as one:
        yield one


def document(page: int) -> list[int]:
    """A page of the demo model's book that no other begins with."""
    (text,) = long_prompts([DOCUMENT + 900 * page])
    return list(text[-DOCUMENT:])


def ask(client: Client, prompt: list[int]) -> Generation:
    return client.generate(
        token_ids=prompt,
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
        attention_profile="exact",
        timeout=GENERATE_TIMEOUT_S,
    )


def check_right(*answers: tuple[list[int], Generation]) -> None:
    tally = Tally()
    for prompt, answer in answers:
        tally.add(compare(answer.token_ids, *csa_tokens(DEMO_MODEL, EXACT, tuple(prompt), NUM_TOKENS)))
    tally.check()


def test_what_the_other_group_has_cached_is_fetched(client: Client) -> None:
    """Usage counts the bytes that came as moved KV, and the tokens as cached."""
    for page in range(TRIES):
        prompt = document(page)
        first = ask(client, prompt)
        turn = [*prompt, *first.token_ids, 7]
        second = ask(client, turn)
        if second.usage.cached_tokens:
            break
    assert second.usage.cached_tokens == CACHED
    token_bytes = first.usage.bytes_moved.kv_transfer / DOCUMENT
    assert second.usage.bytes_moved.kv_transfer == token_bytes * (len(turn) + CACHED)
    check_right((prompt, first), (turn, second))
    wait_for_free_kv(client)


@pytest.mark.parametrize("num_more", [150, 600])
def test_of_what_the_other_group_has_cached_the_common_beginning_is_fetched(
    client: Client, num_more: int
) -> None:
    """The text goes on differently, to before and to behind the end of what is cached; then both groups branch it."""
    for page in range(2 * TRIES, 3 * TRIES):
        prompt, other = document(page + num_more), document(page + num_more + 7)
        turn = [*prompt[:400], *other[:num_more]]
        answers = [(text, ask(client, text)) for text in (prompt, turn, [*turn[:450], *other[::-1]])]
        if answers[1][1].usage.cached_tokens:
            break
    assert answers[1][1].usage.cached_tokens == 384
    check_right(*answers)
    wait_for_free_kv(client)


def test_a_holder_that_dies_while_it_sends_fails_nobody(running: LocalDeployment, client: Client) -> None:
    """Last here: it is stopped before it is asked, and killed when it has been."""
    target = Target(running)
    for page in range(TRIES, 2 * TRIES):
        prompt = document(page)
        first = ask(client, prompt)
        holder = Victim(f"{said(running, r'attempt begins.*prefill=(prefill-.)')[-1]}/0", "engine")
        turn, num_sent = [*prompt, *first.token_ids, 7], len(said(running, SENT))
        target.send(holder, signal.SIGSTOP)
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(ask, client, turn)
            wait_until(lambda call=call, sent=num_sent: call.done() or len(said(running, SENT)) > sent, 60.0)  # type: ignore[misc]
            is_fetching = not call.done()
            target.send(holder, signal.SIGKILL)
            second = call.result(GENERATE_TIMEOUT_S)
        check_right((prompt, first), (turn, second))
        if is_fetching:
            break
        wait_until(lambda: ready(client), timeout=60.0)
    assert is_fetching
    assert second.usage.cached_tokens == 0
    wait_for_free_kv(client)


def said(running: LocalDeployment, pattern: str) -> list[str]:
    """What a deployment's log says of something, each time."""
    found = (re.search(pattern, ANSI.sub("", line)) for line in running.process.lines)
    return [one.group(1) for one in found if one]


def ready(client: Client) -> bool:
    ranks = [one for one in client.cluster_state().workers if one.role == "prefill"]
    return len(ranks) == 2 and all(one.state == "ready" for one in ranks)
