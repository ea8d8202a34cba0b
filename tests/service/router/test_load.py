"""The router over real gRPC. Overload, slow clients, health, drain."""

import asyncio
from typing import Any

import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sps2.v1 import (
    cluster_pb2,
    generation_pb2,
    inference_service_pb2,
)
from support.router_deployment import (
    Code,
    Deployment,
    detail,
    failure,
    prompt,
    reason,
    status_of,
    until,
)
from support.tiny_model import BOS

pytestmark = pytest.mark.service


async def test_a_client_that_never_reads_holds_back_the_worker(up: Deployment) -> None:
    # 20 kB in each message, quick to relay as there is no text in them; gRPC's windows take 4 MB per hop.
    up.decode.tokens, up.decode.rounds = [BOS] * 20_000, 2_000
    call = up.stream(prompt(request_id="slow"))
    sent = -1
    async with asyncio.timeout(8):
        while sent != up.decode.num_sent or sent == 0:
            sent = up.decode.num_sent
            await asyncio.sleep(0.4)
    assert sent < 1_000  # flow control reaches the worker through the router
    # A write that hangs is ended like everything else.
    await up.inference.CancelGeneration(inference_service_pb2.CancelGenerationRequest(request_id="slow"))
    await up.assert_all_freed()
    call.cancel()


async def test_prefill_groups_are_not_flooded() -> None:
    async with Deployment(prefills_per_group=1) as up:
        up.prefill.may_sample.clear()
        calls = [asyncio.ensure_future(up.generate(prompt())) for _ in range(4)]
        await until(lambda: up.router._admission.num_live == 4)
        await asyncio.sleep(0.1)
        assert (len(up.decode.reserved), up.prefill.num_live) == (1, 1)
        up.prefill.may_sample.set()
        assert [(await call).text for call in calls] == ["abcd"] * 4
        await up.assert_all_freed()


async def test_a_full_queue_sheds_and_says_when_to_come_back() -> None:
    async with Deployment(prefills_per_group=1, max_queued_tokens=20) as up:
        up.prefill.may_sample.clear()
        ids = generation_pb2.GenerationSpec(token_ids=generation_pb2.TokenIds(ids=[5] * 15))
        running = asyncio.ensure_future(up.generate(ids))
        await until(lambda: up.prefill.num_live and up.router._queue.num_tokens == 0)
        queued = asyncio.ensure_future(up.generate(ids))
        await until(lambda: up.router._queue.num_tokens)
        error = await failure(up.generate(ids))
        assert (error.code(), reason(error)) == (Code.UNAVAILABLE, "QUEUE_FULL")
        assert detail(error, error_details_pb2.RetryInfo()).HasField("retry_delay")
        up.prefill.may_sample.set()
        assert (await running).text == (await queued).text == "abcd"
        await up.assert_all_freed()


async def test_health_and_refusal_follow_the_groups(up: Deployment) -> None:
    health: Any = health_pb2_grpc.HealthStub(up.channel)
    name = "sps2.v1.InferenceService"

    async def serving() -> bool:
        reply = await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    async def turns(wanted: bool) -> None:
        async with asyncio.timeout(3):
            while await serving() != wanted:  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.01)

    await turns(True)
    starting = cluster_pb2.WORKER_STATE_STARTING
    follower = up.prefill.info(worker_id="prefill-0/1", rank=1, group_size=2)
    await up.view.put(up.prefill.info(state=starting, group_size=2), follower)
    await turns(False)
    error = await failure(up.stream())
    assert (error.code(), reason(error)) == (Code.UNAVAILABLE, "NO_READY_GROUP")
    assert "no ready prefill group: 1 of 2 ranks loading" in status_of(error).message
    assert detail(error, error_details_pb2.RetryInfo()).HasField("retry_delay")
    await up.view.put(up.prefill.info())
    await turns(True)


async def test_drain_finishes_streams_and_takes_no_more(up: Deployment) -> None:
    up.decode.pause_s = 0.1
    call = up.stream()
    await until(lambda: up.decode.num_sent)
    drained = asyncio.ensure_future(up.router.drain())
    await asyncio.sleep(0)
    error = await failure(up.stream())
    assert (error.code(), reason(error)) == (Code.UNAVAILABLE, "DRAINING")
    assert not drained.done()
    events = [event async for event in call]
    assert events[-1].HasField("usage")
    await asyncio.wait_for(drained, 2)
