"""Decode ranks that split layers between them: a deployment answers as one process does, whatever dies or moves."""

from pathlib import Path

import pytest

from sps2_client import Client
from sps2_layout.profiles import EXACT
from support.deployment import DEMO_MODEL, deployment
from support.faults import Victim, make_model, target
from support.identity import Tally, book_prompts, check_greedy
from support.prefix_sharing import Sharing, prompts_alike
from support.resizing import answer_resized
from support.streams import Asked, wait_for_free_kv
from support.waiting import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

NUM_TOKENS = 240
SETTLED_S = 60.0


def posted(client: Client, kind: str) -> dict[str, int]:
    """Bytes that the decode ranks have posted, by rank."""
    workers = client.cluster_state().workers
    return {one.worker_id: one.bytes_posted.get(kind, 0) for one in workers if one.role == "decode"}


def test_a_stream_goes_on_when_a_tensor_rank_dies(tmp_path: Path) -> None:
    """Two slices of the prompt to two parts of the model."""
    arguments = ["--decode-tp", "2", "--debug-invariants"]
    with target(make_model(tmp_path / "tiny"), "1x2", arguments=arguments) as one:
        one.survive(Victim("decode-0/1", "engine"), NUM_TOKENS)
        one.settled(SETTLED_S)
        with one.deployment.client() as client:
            wait_until(lambda: min(posted(client, "tensor").values()) > 0, SETTLED_S)


def test_two_holders_of_two_parts(tmp_path: Path) -> None:
    """From one prefill rank, with a row that moves, and prompts that begin alike."""
    tally, prompts = Tally(), book_prompts((5, 700))
    arguments = ["--decode-tp", "2", "--debug-invariants", "--profile", "exact"]
    with deployment(DEMO_MODEL, "1x1", "1x4", arguments) as running, running.client() as client:
        check_greedy(client, DEMO_MODEL, prompts, 16, tally)
        alone = client.generate(token_ids=prompts[1], max_tokens=NUM_TOKENS, ignore_eos=True)
        resized = answer_resized(client, prompts[1], NUM_TOKENS, [(1, (0,)), (2, ()), (1, (1,))])
        assert resized.token_ids == alone.token_ids
        assert [one.holders for one in resized.resizes] == [(0,), (0, 1), (1,)]
        wait_for_free_kv(client)
        workers = [one for one in client.cluster_state().workers if one.role == "decode"]
        assert {one.tensor_ranks for one in workers} == {2}
        for kind in ("tensor", "q_exchange", "kv_move"):
            assert min(posted(client, kind).values()) > 0, kind
        sharing = Sharing(running, client, EXACT, tally)
        one, other = prompts_alike(640, [30, 100])
        sharing.check(Asked(one, 150, None), [Asked(other, 190, 7)], 640)
    tally.check()
