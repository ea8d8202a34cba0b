"""A request's KV goes from rank to rank while it is answered; the stream does not notice."""

import json
import subprocess

import pytest

from sps2_client import NotFound
from support.deployment import SPS2, LocalDeployment
from support.identity import GENERATE_TIMEOUT_S, book_prompts
from support.resizing import answer_resized, prefill_slices, wait_for_counts
from support.streams import wait_for_free_kv

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

NUM_TOKENS = 120


def test_two_to_one_to_two_and_to_the_other_home(demo: LocalDeployment) -> None:
    (prompt,) = book_prompts([700])
    with demo.client() as client:
        alone = client.generate(
            token_ids=prompt, max_tokens=NUM_TOKENS, ignore_eos=True, timeout=GENERATE_TIMEOUT_S
        )
        before = sum(one.num_resizes for one in client.cluster_state().workers)
        resized = answer_resized(client, prompt, NUM_TOKENS, [(1, ()), (2, ()), (1, (0,)), (1, (1,))])
        wait_for_counts(client, before + 4)
        wait_for_free_kv(client)
        assert prefill_slices(client) > 0
    assert resized.token_ids == alone.token_ids
    assert [len(one.holders) for one in resized.resizes] == [1, 2, 1, 1]
    assert [one.home for one in resized.resizes][-2:] == [0, 1]
    assert all(one.num_blocks_moved for one in resized.resizes)


def test_the_command_line(demo: LocalDeployment) -> None:
    command = [*SPS2, "resize", "nobody", "--degree", "1", "--server", demo.address, "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 3
    assert "nobody" in answer.stdout + answer.stderr
    status = [*SPS2, "status", "--server", demo.address, "--json"]
    shown = subprocess.run(status, capture_output=True, text=True, timeout=60, check=True).stdout
    ranks = [rank for group in json.loads(shown)["pools"]["decode"] for rank in group["ranks"]]
    assert all("num_resizes" in rank for rank in ranks)
    with demo.client() as client, pytest.raises(NotFound):
        client.resize("nobody", 1)
