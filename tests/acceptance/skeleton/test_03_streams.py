"""Must show 3: 8 streams at once give each the tokens that it gets alone."""

import pytest

from support.deployment import DEMO_MODEL, deployment
from support.must_show import MustShow
from support.streams import ask, ask_together, check_same, mixed_requests, most_at_once, wait_for_free_kv

pytestmark = pytest.mark.acceptance

LENGTHS = (3_000, 5, 700, 64, 1_800, 129, 300, 1_000)
ROUNDS = 2


@pytest.mark.parametrize(("prefill", "decode"), [(2, 2), (1, 3)])
def test_streams_at_once(must_show: MustShow, prefill: int, decode: int) -> None:
    with must_show(f"3 {len(LENGTHS)} streams at once, (R, D) = ({prefill}, {decode})") as figures:
        requests = mixed_requests(LENGTHS, least_tokens=48)
        with deployment(prefill=f"1x{prefill}", decode=f"1x{decode}") as running, running.client() as client:
            alone = [ask(client, one) for one in requests]
            for _ in range(ROUNDS):
                together = ask_together(client, requests)
                tally = check_same(DEMO_MODEL, requests, alone, together)
                figures += [str(tally), f"up to {most_at_once(together)} decoding at once"]
                tally.check()
                assert most_at_once(together) > 1, "they were served one after the other"
                wait_for_free_kv(client)
        figures.append("0 KV blocks used afterwards")
