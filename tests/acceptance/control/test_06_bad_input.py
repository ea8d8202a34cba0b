"""Must show 6: the bad-input table by raw calls; afterwards it answers as before and holds no block.

Not here: the dtype or shape of tensors, offsets that overflow, a rank outside the group, a full queue.
"""

import pytest

from sps2_client import GenerationOptions
from support.bad_calls import check_calls, spec_calls, wire_calls, worker_calls
from support.bad_input import check_all_refused
from support.deployment import deployment
from support.must_show import MustShow
from support.streams import wait_for_free_kv

pytestmark = pytest.mark.acceptance

QUESTION: GenerationOptions = {"token_ids": [5, 6, 7], "max_tokens": 8, "ignore_eos": True}


def test_every_row(must_show: MustShow) -> None:
    with must_show("6 bad input") as figures, deployment() as running, running.client() as client:
        model = client.list_models()[0]
        before = client.generate(**QUESTION).token_ids
        leader = next(one for one in client.cluster_state().workers if one.worker_id == "decode-0/0")
        count = check_calls(running.address, spec_calls(model) + wire_calls())
        count += check_calls(leader.grpc_address, worker_calls(model))
        count += check_all_refused(running)
        assert client.generate(**QUESTION).token_ids == before
        wait_for_free_kv(client)
        figures.append(
            f"{count} calls refused with status and field; then it served as before, with every block free"
        )
