"""Must show 5: three times as much as a deployment can take, for a minute.

The queue stays bounded, who is sent away hears at once when to come again, what is answered is no less than under the
load that it can take, and a moment later nothing is left of it.
"""

import asyncio
from collections.abc import Iterator

import pytest

from sps2_client import AsyncClient
from support.deployment import LocalDeployment, deployment
from support.must_show import MustShow
from support.overload import Calls, Outcome, capacity, offer, quantile, settle

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(900)]

SECONDS = 60.0
OVERLOAD = 3
MAX_QUEUE_S = 4.0
CALLS = Calls(num_prompt=1500, num_output=4, timeout_s=30.0)
"""Long enough that few calls are the whole capacity, so that neither the client nor the refusals take cores from it."""
SHED_P99_S = 0.2
GOODPUT = 0.9
SETTLE_S = 10.0


@pytest.fixture(scope="module")
def overloaded() -> Iterator[LocalDeployment]:
    arguments = ["--threads", "1", "--quiet", "--max-queue-s", str(MAX_QUEUE_S)]
    with deployment(prefill="1x1", decode="1x1", arguments=arguments) as running:
        yield running


def test_three_times_the_capacity(overloaded: LocalDeployment, must_show: MustShow) -> None:
    with must_show(f"5 overload: {OVERLOAD}x capacity for {SECONDS:g} s") as figures:
        asyncio.run(_show(overloaded.address, figures))


async def _show(address: str, figures: list[str]) -> None:
    async with AsyncClient(address, max_retries=0) as client:
        await capacity(client, CALLS, num_clients=4, seconds=5)  # warm, and the drain rate known
        rate = await capacity(client, CALLS, num_clients=4, seconds=20)
        figures.append(f"capacity {rate:.2f}/s")
        once = await offer(client, CALLS, rate, SECONDS, seed=1)
        figures.append(f"1x: {once}")
        await settle(client)
        much = await offer(client, CALLS, OVERLOAD * rate, SECONDS, seed=2)
        figures.append(f"{OVERLOAD}x: {much}")
        figures.append(
            f"told to come again in {min(much.retry_after_s):.1f} to {max(much.retry_after_s):.1f} s"
        )
        figures.append(f"goodput {much.goodput / once.goodput:.0%} of 1x")
        await settle(client)
        after = await offer(client, CALLS, rate / 2, SECONDS / 3, seed=3)
        figures.append(f"the last answer {much.tail_s:.1f} s after the last call; then at 0.5x: {after}")
    _check(rate, once, much, after)


def _check(rate: float, once: Outcome, much: Outcome, after: Outcome) -> None:
    assert once.failures + much.failures + after.failures == {}
    assert much.most_queued <= 1.5 * MAX_QUEUE_S * rate * CALLS.num_prompt
    assert len(much.retry_after_s) == len(much.shed_s) > 0
    assert quantile(much.shed_s, 0.99) <= SHED_P99_S
    assert much.goodput >= GOODPUT * once.goodput
    assert much.tail_s < SETTLE_S
    assert not after.shed_s
    assert quantile(after.answered_s, 0.5) <= quantile(once.answered_s, 0.5)
