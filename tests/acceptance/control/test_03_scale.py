"""Must show 3: pools grow and shrink under load without a failed request, and a new group is used within a second."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from statistics import median

import pytest

from sps2_client import Client, Generation, Unavailable
from support.deployment import DEMO_MODEL, LocalDeployment, deployment
from support.elastic import (
    Load,
    attempts_after_draining,
    exits,
    group_of,
    handed_back,
    rank_pid,
    same_tokens,
    scale,
    uses,
    wait_for_groups,
)
from support.faults import SEEN_BEFORE, read_tokens
from support.identity import GENERATE_TIMEOUT_S, book_ids
from support.must_show import MustShow
from support.streams import Answered, Asked, ask, mixed_requests, wait_for_free_kv
from support.waiting import wait_until

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(1800)]

NUM_ROUNDS = 20
USED_S = 1.0
BUDGET_S = 1.0
LEFT_S = 30.0
LONG = 1500
"""Output tokens of a stream that outlasts the budget."""
PROMPT_TOKENS = 16_000
"""Takes a prefill group seconds."""


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def elastic(logs: Path) -> Iterator[LocalDeployment]:
    arguments = ["--profile", "exact", "--threads", "1", "--log-dir", str(logs)]
    arguments += ["--drain-timeout", str(10 + BUDGET_S)]
    with deployment(DEMO_MODEL, "1x1", "1x2", arguments) as running:
        yield running


def test_twenty_times_up_and_down(elastic: LocalDeployment, logs: Path, must_show: MustShow) -> None:
    log, requests = logs / "router.log", mixed_requests([150, 40, 300, 90, 700, 20], least_tokens=8)
    with must_show(f"3 scale: {NUM_ROUNDS} times up and down under load") as figures:
        with elastic.client() as client:
            answers = [ask(client, one) for one in requests]
            with Load(elastic.address, DEMO_MODEL, requests, answers, num_clients=5) as load:
                for _ in range(NUM_ROUNDS):
                    scale(elastic, "prefill=2", "decode=2")
                    wait_until(lambda: all(one.after_s is not None for one in uses(log)), 30)
                    scale(elastic, "prefill=1", "decode=1")
                    assert not load.failures, load.failures
            wait_for_free_kv(client)
        load.check()
        figures.append(f"{load.num_answers} requests, {len(load.failures)} failed, {load.tally}")
        joined = [one for one in uses(log) if one.group.endswith("-1")]
        times = [one.after_s for one in joined if one.after_s is not None]
        assert len(times) == 2 * NUM_ROUNDS
        figures.append(f"ready to used: median {median(times) * 1e3:.0f} ms, max {max(times) * 1e3:.0f} ms")
        assert attempts_after_draining(log) == []
        assert exits(elastic, "decode-1") == exits(elastic, "prefill-1") == [True] * NUM_ROUNDS
        assert max(times) <= USED_S


@pytest.mark.parametrize("seed", [None, 7], ids=["greedy", "sampled"])
def test_a_stream_outlasts_the_drain(
    elastic: LocalDeployment, logs: Path, must_show: MustShow, seed: int | None
) -> None:
    asked = Asked(book_ids()[:600], LONG, seed)
    name = "greedy" if seed is None else "sampled"
    with must_show(f"3 scale: a {name} stream longer than the drain's budget") as figures:
        with elastic.client() as client:
            alone = ask(client, asked)
            scale(elastic, "decode=2")
            wait_for_free_kv(client)
            with client.stream(timeout=GENERATE_TIMEOUT_S, **asked.options) as stream:
                read_tokens(stream, SEEN_BEFORE)
                leaving = group_of(client, "decode")
                client.drain_group(leaving)
                tokens = stream.final().token_ids
            assert handed_back(logs, leaving)[-1:] == [1]
            _one_decode_group(elastic, client)
        tally = same_tokens(DEMO_MODEL, asked, tokens, alone.token_ids)
        tally.check()
        figures.append(f"handed back after {BUDGET_S:g} s and resumed elsewhere: {tally}")


@pytest.mark.parametrize("finishes", [True, False], ids=["finishes", "handed-back"])
def test_a_prefill_group_leaves_while_it_computes(
    elastic: LocalDeployment, logs: Path, must_show: MustShow, *, finishes: bool
) -> None:
    """Its prompt takes less than the budget, or more."""
    length = PROMPT_TOKENS // 8 if finishes else PROMPT_TOKENS
    prompt = (book_ids() * (length // len(book_ids()) + 1))[:length]
    asked = Asked(prompt, 20, 1)
    with must_show(f"3 scale: a prefill group drained amid a prompt of {length:,} tokens") as figures:
        with elastic.client() as client, ThreadPoolExecutor(1) as pool:
            alone = ask(client, asked)
            scale(elastic, "prefill=2")
            wait_for_free_kv(client)
            before = len(handed_back(logs, "prefill-0")) + len(handed_back(logs, "prefill-1"))
            asking, leaving = _ask_until_seen(client, pool, asked)
            client.drain_group(leaving)
            answer: Answered = asking.result(GENERATE_TIMEOUT_S)
            wait_until(lambda: leaving not in _groups(client), LEFT_S)
            count = len(handed_back(logs, "prefill-0")) + len(handed_back(logs, "prefill-1")) - before
        assert answer.token_ids == alone.token_ids
        assert count == (0 if finishes else 1)
        figures.append("tokens right, " + ("delivered before it left" if finishes else "computed elsewhere"))


def test_the_last_group_leaves(elastic: LocalDeployment, logs: Path, must_show: MustShow) -> None:
    """A stream waits for the next group; new requests are told to come again; nothing is lost silently."""
    asked = Asked(book_ids()[:300], LONG, 3)
    with must_show("3 scale: the last decode group drained") as figures:
        with elastic.client() as client:
            _one_decode_group(elastic, client)
            alone = ask(client, asked)
            with client.stream(timeout=GENERATE_TIMEOUT_S, **asked.options) as stream:
                read_tokens(stream, SEEN_BEFORE)
                leaving = group_of(client, "decode")
                client.drain_group(leaving)
                wait_until(lambda: leaving not in _ready(client))
                with pytest.raises(Unavailable) as refused:
                    _short(client)
                assert (refused.value.reason, refused.value.retry_after is not None) == (
                    "NO_READY_GROUP",
                    True,
                )
                wait_until(lambda: leaving not in _groups(client), LEFT_S)
                scale(elastic, "decode=1")
                tokens = stream.final().token_ids
        assert tokens == alone.token_ids
        figures.append("new requests UNAVAILABLE with RetryInfo; the stream went on when a group came")


def test_a_rank_of_a_group_that_drains_dies(elastic: LocalDeployment, must_show: MustShow) -> None:
    asked = Asked(book_ids()[:600], LONG, 5)
    with must_show("3 scale: a draining group's follower killed") as figures:
        with elastic.client() as client:
            alone = ask(client, asked)
            scale(elastic, "decode=2")
            wait_for_free_kv(client)
            with client.stream(timeout=GENERATE_TIMEOUT_S, **asked.options) as stream:
                read_tokens(stream, SEEN_BEFORE)
                leaving = group_of(client, "decode")
                victim = rank_pid(elastic, leaving, 1)
                client.drain_group(leaving)
                os.kill(victim, signal.SIGKILL)
                tokens = stream.final().token_ids
            wait_until(lambda: leaving not in _groups(client), LEFT_S)
        assert tokens == alone.token_ids
        figures.append("the stream went on elsewhere token for token, and the group left")


def _one_decode_group(elastic: LocalDeployment, client: Client) -> None:
    wait_until(lambda: set(_groups(client)) == set(_ready(client)), LEFT_S)
    scale(elastic, "decode=1", "prefill=1")
    wait_for_groups(client, *_groups(client))
    wait_for_free_kv(client)


def _groups(client: Client) -> list[str]:
    return sorted({one.group for one in client.cluster_state().workers})


def _ready(client: Client) -> list[str]:
    workers = client.cluster_state().workers
    return sorted(one.group for one in workers if one.rank == 0 and one.state == "ready")


def _ask_until_seen(client: Client, pool: ThreadPoolExecutor, asked: Asked) -> tuple[Future[Answered], str]:
    """A prompt, and the group that computes it: again where it was over before a heartbeat told of it."""
    deadline = time.monotonic() + GENERATE_TIMEOUT_S
    while time.monotonic() < deadline:
        asking, seen = pool.submit(ask, client, asked), list[str]()
        while not seen and not asking.done():
            seen = _computing(client)
        if seen and not asking.done():
            return asking, seen[0]
        wait_for_free_kv(client)
    raise AssertionError("no group was seen to compute")


def _computing(client: Client) -> list[str]:
    """Prefill groups that compute, by the KV that they hold."""
    workers = client.cluster_state().workers
    return [one.group for one in workers if one.role == "prefill" and one.kv_blocks_used]


def _short(client: Client) -> Generation:
    return client.generate("x", max_tokens=2)
