"""The router over real gRPC. Whatever ends a request early, both leaders are free at once."""

import asyncio
from typing import Any

import pytest

from sps2.v1 import (
    inference_service_pb2,
)
from support.router_deployment import (
    Code,
    Deployment,
    failure,
    fields,
    prompt,
    reason,
    until,
)

pytestmark = pytest.mark.service


@pytest.mark.parametrize("how", ["client", "by_id", "deadline"])
@pytest.mark.parametrize("phase", ["prefilling", "transferring", "decoding"])
async def test_the_end_of_a_request_reaches_both_leaders(up: Deployment, how: str, phase: str) -> None:
    reached: Any = {
        "prefilling": lambda: up.prefill.num_live,
        "transferring": lambda: up.decode.started,
        "decoding": lambda: up.decode.num_sent > 2,
    }[phase]
    if phase == "prefilling":
        up.prefill.may_sample.clear()
    if phase == "transferring":
        up.decode.may_commit.clear()
    up.decode.tokens, up.decode.pause_s = [9] * 500, 0.01
    call = up.stream(prompt(request_id="r"), timeout=0.4 if how == "deadline" else 10)
    ended = asyncio.ensure_future(failure(call) if how != "client" else _drained(call))
    await until(reached)
    if how == "client":
        call.cancel()
    if how == "by_id":
        await up.inference.CancelGeneration(inference_service_pb2.CancelGenerationRequest(request_id="r"))
    error = await asyncio.wait_for(ended, 3)
    if how == "by_id":
        assert (error.code(), reason(error)) == (Code.CANCELLED, "CANCELLED")
    if how == "deadline":
        assert error.code() == Code.DEADLINE_EXCEEDED
    await up.assert_all_freed()
    assert up.decode.num_cancelled == 1


async def test_a_client_that_gives_a_whole_answer_up(up: Deployment) -> None:
    up.decode.tokens, up.decode.pause_s = [9] * 500, 0.01
    call = up.whole(prompt())
    await until(lambda: up.decode.num_sent > 2)
    call.cancel()
    await up.assert_all_freed()
    assert up.decode.num_cancelled == 1


async def test_a_waiting_request_leaves_the_queue_when_its_client_does() -> None:
    async with Deployment(prefills_per_group=1) as up:
        up.prefill.may_sample.clear()
        first, second = up.stream(), up.stream()
        reading = asyncio.ensure_future(_drained(first))
        await until(lambda: up.router._admission.num_live == 2 and up.prefill.num_live == 1)
        second.cancel()
        # The first one is out of the queue when the router has heard that its prefill started.
        await until(lambda: up.router._admission.num_live == 1 and not up.router._queue.num_tokens)
        first.cancel()
        await reading
        await up.assert_all_freed()


async def _drained(call: Any) -> Any:
    with pytest.raises(asyncio.CancelledError):
        async for _ in call:
            pass


async def test_cancel_of_an_unknown_request(up: Deployment) -> None:
    cancel = inference_service_pb2.CancelGenerationRequest
    error = await failure(up.inference.CancelGeneration(cancel(request_id="who")))
    assert (error.code(), reason(error)) == (Code.NOT_FOUND, "REQUEST_NOT_FOUND")
    error = await failure(up.inference.CancelGeneration(cancel()))
    assert (error.code(), fields(error)) == (Code.INVALID_ARGUMENT, ["request_id"])


async def test_a_silent_request_ends_and_one_with_progress_does_not() -> None:
    async with Deployment(max_silence_s=1) as up:
        up.prefill.may_sample.clear()
        working = asyncio.ensure_future(up.generate(prompt()))
        await asyncio.sleep(1.3)
        assert not working.done()
        up.prefill.reports_progress = False
        error = await failure(working)
        assert (error.code(), reason(error)) == (Code.DEADLINE_EXCEEDED, "SILENT")
        await up.assert_all_freed()


async def test_the_total_cap() -> None:
    async with Deployment(max_request_s=1) as up:
        up.prefill.may_sample.clear()
        error = await failure(up.stream(timeout=20))
        assert (error.code(), reason(error)) == (Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
        await up.assert_all_freed()
