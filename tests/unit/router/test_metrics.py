"""What a router's metrics make of what they are told: bounded series, whatever comes."""

import asyncio
import random
from contextlib import suppress
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from sps2.v1 import generation_pb2
from sps2_layout.attention import Attention
from sps2_layout.profiles import EXACT
from sps2_router.handshake import Phase
from sps2_router.metrics import SHED_REASONS, RouterMetrics, RouterState
from sps2_router.types import Request, Reuse, TokenChoice
from sps2_service.errors import ERROR_OF_CODE, ServiceError, Unavailable
from support.metrics import Scrape

NUM_REQUESTS = 1000
STATE = RouterState(
    num_running=3, num_waiting=2, waiting_tokens=500, queue_limit_tokens=900, is_directory_away=True
)


@pytest.fixture
async def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
async def metrics(registry: CollectorRegistry) -> RouterMetrics:
    return RouterMetrics(registry, lambda: STATE)


async def seen(registry: CollectorRegistry) -> Scrape:
    return Scrape((await asyncio.to_thread(generate_latest, registry)).decode())


def request(request_id: str = "canary-id") -> Request:
    choice = TokenChoice(
        temperature=0, top_p=1, top_k=-1, seed=1, stop_token_ids=(), max_tokens=3, stop_strings=("canary",)
    )
    attention = Attention.admit(EXACT, 4)
    return Request(request_id, (1, 2, 3, 4), choice, attention, "canary-profile", tenant="canary-tenant")


def one_request(metrics: RouterMetrics, draw: random.Random) -> None:
    """A call that ends in one of the ways in which calls do."""
    make = draw.choice([None, *ERROR_OF_CODE.values()])
    reason = draw.choice([*sorted(SHED_REASONS), f"MADE_UP_{draw.random()}"])
    with suppress(ServiceError), metrics.call() as outcome, metrics.answering(lambda: 5):
        metrics.failed_over(draw.choice(list(Phase)))
        metrics.first_token(request(f"canary-{draw.random()}"), 0, draw.expovariate(1))
        metrics.inter_token.observe(draw.expovariate(10))
        metrics.answered(generation_pb2.Timings(e2e=draw.expovariate(0.1)), 1.0)
        if make is not None:
            raise make(reason, f"canary message {draw.random()}")
        outcome.finish_reason = draw.choice(generation_pb2.FinishReason.values())


async def test_series_do_not_grow_with_requests(metrics: RouterMetrics, registry: CollectorRegistry) -> None:
    draw = random.Random(7)
    sizes = []
    for _ in range(2):
        for _ in range(NUM_REQUESTS):
            one_request(metrics, draw)
        sizes.append(len((await seen(registry)).series))
    assert sizes[0] == sizes[1] < 300
    text = (await seen(registry)).text
    assert "canary" not in text
    assert "MADE_UP" not in text


async def test_calls_by_their_ends(metrics: RouterMetrics, registry: CollectorRegistry) -> None:
    with metrics.call() as outcome:
        outcome.finish_reason = generation_pb2.FINISH_REASON_LENGTH
    for error in (Unavailable("QUEUE_FULL", "full"), asyncio.CancelledError(), ValueError("a bug")):
        with pytest.raises(type(error)), metrics.call():
            raise error
    now = await seen(registry)
    assert now.value("sps2_requests_total", finish_reason="length", status="OK") == 1
    for status in ("UNAVAILABLE", "CANCELLED", "INTERNAL"):
        assert now.value("sps2_requests_total", finish_reason="none", status=status) == 1
    assert now.value("sps2_shed_total", reason="QUEUE_FULL") == 1
    assert now.total("sps2_shed_total") == 1


async def test_tokens_of_live_answers_count(metrics: RouterMetrics, registry: CollectorRegistry) -> None:
    sent = 2
    with metrics.answering(lambda: sent):
        assert (await seen(registry)).value("sps2_generation_tokens_total") == 2
        sent = 5
        assert (await seen(registry)).value("sps2_generation_tokens_total") == 5
    assert (await seen(registry)).value("sps2_generation_tokens_total") == 5


async def test_prompts_that_may_not_reuse_ask_nothing(
    metrics: RouterMetrics, registry: CollectorRegistry
) -> None:
    metrics.first_token(request(), 2, 0.1)
    metrics.first_token(replace(request(), reuse=Reuse.OFF), 0, 0.1)
    now = await seen(registry)
    names = ("prompt_tokens", "prefix_cache_queries", "prefix_cache_hits")
    assert [now.value(f"sps2_{name}_total") for name in names] == [8, 4, 2]


async def test_state_is_as_it_is_when_asked(metrics: RouterMetrics, registry: CollectorRegistry) -> None:
    now = await seen(registry)
    names = ("num_requests_running", "num_requests_waiting", "waiting_tokens", "queue_limit_tokens")
    assert [now.value(f"sps2_{name}") for name in (*names, "directory_degraded")] == [3, 2, 500, 900, 1]
