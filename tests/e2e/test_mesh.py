"""A deployment whose prefill ranks split the prompt and the model answers as one process does."""

import json
from pathlib import Path

import pytest

from sps2_client import Client
from sps2_layout.profile_file import load_profile
from support.csa_oracle import check_csa
from support.deployment import DEMO_MODEL, deployment
from support.identity import Tally, book_prompts
from support.streams import wait_for_free_kv
from support.traffic import Shape
from support.waiting import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

LENGTHS = (5, 700, 1_237, 64)
RUNGS = {
    "min_shard_tokens": 128,
    "profiles": [{"shards": 8, "levels": [[1, 1], [2, 2], [8, 4]], "tail": 16, "sinks": 4}],
}
SETTLE_S = 15.0


def posted(client: Client, kind: str) -> int:
    """Bytes that all ranks have posted, as they last reported."""
    return sum(worker.bytes_posted.get(kind, 0) for worker in client.cluster_state().workers)


def test_one_slice_of_four_parts(tmp_path: Path) -> None:
    """Two ranks hold the same KV head and deliver half of its tokens each."""
    (tmp_path / "small.json").write_text(json.dumps(RUNGS), encoding="utf-8")
    profile = str(tmp_path / "small.json")
    tally, prompts = Tally(), book_prompts(LENGTHS)
    arguments = ["--profile", profile, "--prefill-tp", "4"]
    with deployment(prefill="1x4", arguments=arguments) as running, running.client() as client:
        said = check_csa(client, DEMO_MODEL, load_profile(profile), prompts, 16, tally)
        wait_for_free_kv(client)
        least_kv = sum(Shape.of(DEMO_MODEL).least_kv(length) for length in LENGTHS)
        wait_until(lambda: posted(client, "kv_transfer") >= least_kv, SETTLE_S, interval=0.1)
        assert posted(client, "kv_transfer") == least_kv, "each head of each token once"
        assert posted(client, "tensor") > 0
        assert posted(client, "all_to_all") == 0
    assert {one.split(" levels")[0] for one in said} == {"exact", "small: N=8 A=156"}
    tally.check()
