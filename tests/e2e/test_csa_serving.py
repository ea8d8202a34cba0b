"""A deployment with a CSA profile answers as one process does under the same mask, at every degree."""

import json
from functools import partial
from pathlib import Path

import pytest

from sps2_layout.profile_file import load_profile
from sps2_layout.profiles import EXACT
from support.csa_oracle import check_csa, csa_tokens
from support.deployment import DEMO_MODEL, deployment
from support.identity import Tally, book_prompts
from support.in_a_row import check_in_a_row
from support.streams import wait_for_free_kv

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

LENGTHS = (5, 700, 1_237, 64)
NUM_TOKENS = 16
LOG_S = 10.0
RUNGS = {
    "min_shard_tokens": 128,
    "profiles": [
        {"shards": 4, "levels": [[1, 1], [4, 4]], "tail": 16, "sinks": 4},
        {"shards": 8, "levels": [[1, 1], [2, 2], [8, 4]], "query_mode": "dense", "tail": 8},
    ],
}
MASKS = ["exact", "small: N=4 A=176", "small: N=8 A=156", "exact"]


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profiles") / "small.json"
    path.write_text(json.dumps(RUNGS), encoding="utf-8")
    return path


@pytest.mark.parametrize(("num_ranks", "exchange"), [(1, "auto"), (3, "heads"), (4, "auto"), (3, "kv")])
def test_mixed_prompts(profile: Path, num_ranks: int, exchange: str) -> None:
    """Three ranks: only two of them divide the shards, the third stays in step; exact prompts use all three.

    By `kv` the shards are folded where there are two to a rank; sampled queries are served by it as well.
    """
    tally, ladder, prompts = Tally(), load_profile(str(profile)), book_prompts(LENGTHS)
    with (
        deployment(
            prefill=f"1x{num_ranks}", arguments=["--profile", str(profile), "--exchange", exchange]
        ) as running,
        running.client() as client,
    ):
        said = check_csa(client, DEMO_MODEL, ladder, prompts, NUM_TOKENS, tally)
        exact = client.generate(token_ids=prompts[1], max_tokens=2, attention_profile="exact")
        wait_for_free_kv(client)
        if exchange != "auto":
            running.process.wait_for_line(rf'"?exchange"?[=:] ?"?{exchange}\b', LOG_S)
    assert [one.split(" levels")[0] for one in said] == MASKS
    assert exact.usage.attention_profile == "exact"
    tally.check()


def test_two_prompts_in_a_row(profile: Path) -> None:
    """The second is the beginning of the first: nothing of it may be taken over."""
    tally, start = Tally(), partial(deployment, prefill="1x2", arguments=["--profile", str(profile)])
    check_in_a_row(start, DEMO_MODEL, load_profile(str(profile)), book_prompts([1_237, 700]), 4, tally)
    tally.check()


def test_the_oracle_tells_masks_apart(profile: Path) -> None:
    """Else the comparison above would prove nothing."""
    (prompt,) = book_prompts([1_237])
    sparse = csa_tokens(DEMO_MODEL, load_profile(str(profile)), prompt, NUM_TOKENS)
    assert sparse[1] != csa_tokens(DEMO_MODEL, EXACT, prompt, NUM_TOKENS)[1]
