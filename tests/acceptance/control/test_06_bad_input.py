"""Must show 6: the bad-input table by raw calls; afterwards it answers as before and holds no block."""

import pytest

from sps2_client import GenerationOptions
from support.bad_calls import check_calls, spec_calls, wire_calls
from support.bad_input import check_all_refused
from support.bad_worker_calls import check_worker_calls
from support.deployment import DEMO_MODEL, deployment
from support.full_queue import check_full_queue
from support.must_show import MustShow
from support.streams import wait_for_free_kv

pytestmark = pytest.mark.acceptance

MAX_QUEUED_TOKENS = 4000
LIMITS = {"SPS2_MAX_QUEUED_TOKENS": str(MAX_QUEUED_TOKENS)}
QUESTION: GenerationOptions = {"token_ids": [5, 6, 7], "max_tokens": 8, "ignore_eos": True}


def test_every_row(must_show: MustShow) -> None:
    with must_show("6 bad input") as figures, deployment(env=LIMITS) as running, running.client() as client:
        model = client.list_models()[0]
        before = client.generate(**QUESTION).token_ids
        count = check_calls(running.address, spec_calls(model) + wire_calls())
        count += check_worker_calls(client, DEMO_MODEL)
        count += check_all_refused(running)
        assert client.generate(**QUESTION).token_ids == before
        shed_s = check_full_queue(client, running.address, MAX_QUEUED_TOKENS)
        wait_for_free_kv(client)
        assert client.generate(**QUESTION).token_ids == before
        figures.append(
            f"{count} calls refused with status and field; then it served as before, with every block free"
        )
        figures.append(f"a full queue said when to come back within {1e3 * shed_s:.0f} ms")
