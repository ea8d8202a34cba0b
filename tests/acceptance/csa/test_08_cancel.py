"""Must show 8: a cancel during a prefill of 64k tokens frees every rank within 500 ms."""

import time

import pytest

from sps2_client import Client
from support.csa_oracle import long_prompts
from support.deployment import LocalDeployment, deployment
from support.identity import GENERATE_TIMEOUT_S, Prompt
from support.must_show import MustShow
from support.streams import wait_for_free_kv

pytestmark = pytest.mark.acceptance

LONG = 65_400
DECODE_RANKS = 3
WITHIN_S = 0.5
REPORT_TIMEOUT_S = 30.0
MOMENTS_S = (0.5, 1.0, 1.9, 2.7, 3.4, 4.1)
"""When the cancel comes, after the prefill has been asked for: in several layers, in and between exchanges."""


def freed_after(
    running: LocalDeployment, client: Client, long: Prompt, num_ranks: int, moment: float, profile: str
) -> float:
    """Seconds from the call that cancels to the last rank's report that it has freed all its blocks.

    A rank carries the order to free them out when its compute is over, so that it is idle then.
    """
    with client.stream(
        token_ids=long,
        max_tokens=1,
        attention_profile=profile,
        prefix_reuse="off",
        timeout=GENERATE_TIMEOUT_S,
    ) as stream:
        time.sleep(moment)
        assert client.cluster_state().num_requests_by_group["prefill-0"] == 1, "nothing is left to cancel"
        seen = len(running.process.lines)
        started = time.monotonic()
        stream.close()
    for rank in range(num_ranks):
        free = rf"prefill-0/{rank} engine \| .*given up: 0 KV blocks in use"
        running.process.wait_for_line(free, REPORT_TIMEOUT_S, after=seen)
    return time.monotonic() - started


@pytest.mark.parametrize("profile", ["exact", "paper", "default"])
@pytest.mark.parametrize(("num_ranks", "exchange"), [(1, "heads"), (2, "heads"), (2, "kv"), (4, "heads")])
def test_cancel(must_show: MustShow, num_ranks: int, exchange: str, profile: str) -> None:
    """At every moment; afterwards no block is in use anywhere, the decode ranks' included."""
    title = f"8 cancel of a {LONG:,}-token {profile} prefill on {num_ranks} ranks by {exchange}"
    with must_show(title) as figures:
        (long,) = long_prompts([LONG])
        arguments = ["--kv-tokens", str(LONG // min(num_ranks, DECODE_RANKS) + 256), "--exchange", exchange]
        with (
            deployment(prefill=f"1x{num_ranks}", decode=f"1x{DECODE_RANKS}", arguments=arguments) as running,
            running.client() as client,
        ):
            client.generate(token_ids=long[:600], max_tokens=1, timeout=GENERATE_TIMEOUT_S)
            seconds = [freed_after(running, client, long, num_ranks, moment, profile) for moment in MOMENTS_S]
            wait_for_free_kv(client)
        figures.append(
            f"every rank idle and free {', '.join(f'{one * 1000:.0f}' for one in seconds)} ms after the cancel"
        )
        assert max(seconds) <= WITHIN_S
