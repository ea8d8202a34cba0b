"""A router's metrics after calls over real gRPC."""

import asyncio

import pytest
from prometheus_client import generate_latest

from support.fake_workers import NO_KV, PREEMPTED, Refusal, rank_died
from support.metrics import Scrape
from support.router_deployment import Code, Deployment, failure, prompt, until
from support.tiny_model import byte_ids

pytestmark = pytest.mark.service


async def seen(up: Deployment) -> Scrape:
    return Scrape((await asyncio.to_thread(generate_latest, up.router.registry)).decode())


async def test_an_answer(up: Deployment) -> None:
    usage = (await up.generate(prompt(request_id="canary"))).usage
    now = await seen(up)
    assert now.value("sps2_requests_total", finish_reason="length", status="OK") == 1
    assert now.value("sps2_generation_tokens_total") == usage.output_tokens == 4
    assert now.value("sps2_prompt_tokens_total") == usage.prompt_tokens
    assert now.value("sps2_inter_token_latency_seconds_count") == 3
    assert now.value("sps2_inter_token_latency_seconds_sum") == pytest.approx(
        now.value("sps2_request_decode_time_seconds_sum")
    )
    for name, seconds in (
        ("time_to_first_token_seconds", usage.timings.ttft),
        ("e2e_request_latency_seconds", usage.timings.e2e),
        ("request_queue_time_seconds", usage.timings.queue),
        ("request_prefill_time_seconds", usage.timings.prefill),
        ("request_transfer_time_seconds", usage.timings.transfer),
    ):
        assert now.value(f"sps2_{name}_count") == 1
        assert now.value(f"sps2_{name}_sum") == pytest.approx(seconds)
    assert "canary" not in now.text


async def test_choices_have_gaps_of_their_own(up: Deployment) -> None:
    up.decode.tokens_by_choice = {0: byte_ids(b"bcd"), 1: byte_ids(b"xyz")}
    await up.generate(prompt(num_choices=2))
    now = await seen(up)
    assert now.value("sps2_time_to_first_token_seconds_count") == 1
    assert now.value("sps2_inter_token_latency_seconds_count") == 6


async def test_what_waits_and_what_runs(up: Deployment) -> None:
    up.prefill.may_sample.clear()
    running = asyncio.ensure_future(up.generate(prompt()))
    await until(lambda: up.prefill.num_live == 1 and up.router._queue.num_waiting == 0)
    now = await seen(up)
    assert (now.value("sps2_num_requests_running"), now.value("sps2_num_requests_waiting")) == (1, 0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await until(lambda: up.router._admission.num_live == 0)
    now = await seen(up)
    assert now.value("sps2_num_requests_running") == 0
    assert now.value("sps2_requests_total", finish_reason="none", status="CANCELLED") == 1


async def test_failures_and_what_is_none(up: Deployment) -> None:
    up.prefill.refusals = [rank_died("prefill-0/1")]
    await up.generate(prompt())
    up.decode.refuse_commit = [PREEMPTED]
    await up.generate(prompt())
    up.decode.refusals = [NO_KV]
    await up.generate(prompt())
    up.decode.fail_after = [(1, rank_died("decode-0/1"))]
    await up.generate(prompt())
    now = await seen(up)
    assert now.value("sps2_failovers_total", stage="before_commit") == 1
    assert now.value("sps2_failovers_total", stage="after_commit") == 1
    assert now.value("sps2_requests_total", finish_reason="length", status="OK") == 4
    assert now.value("sps2_time_to_first_token_seconds_count") == 4


async def test_calls_that_are_refused(up: Deployment) -> None:
    await failure(up.stream(prompt(model="no such model")))
    up.prefill.refusals = [Refusal(Code.INTERNAL, "NON_FINITE_LOGITS")]
    await failure(up.stream(prompt()))
    now = await seen(up)
    assert now.value("sps2_requests_total", finish_reason="none", status="NOT_FOUND") == 1
    assert now.value("sps2_requests_total", finish_reason="none", status="INTERNAL") == 1
    assert now.total("sps2_shed_total") == 0
