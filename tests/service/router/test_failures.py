"""The router over real gRPC. Leaders that fail: unseen before the commit point, a typed error after it."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.rpc import error_details_pb2

from support.fake_workers import NO_KV, FakeDecode, FakePrefill, Refusal, rank_died
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

pytestmark = pytest.mark.service


async def test_failures_before_the_commit_are_not_seen(up: Deployment) -> None:
    up.prefills.append(FakePrefill("prefill-1/0"))
    up.decodes.append(FakeDecode("decode-1/0"))
    await up.add(up.prefills[1], up.decodes[1])
    up.prefill.refusals = [rank_died("prefill-0/1")]
    up.decode.refuse_commit = [rank_died("decode-0/1")]
    answer = await up.generate(prompt())
    assert answer.text == "abcd"
    assert [one.attempt.number for one in up.decode.reserved] == [1, 2]
    assert [one.attempt.number for one in up.decodes[1].reserved] == [3]
    assert [one.attempt.number for one in up.prefills[1].requests] == [2, 3]


async def test_attempts_are_counted(up: Deployment) -> None:
    up.prefill.refusals = [rank_died("prefill-0/1")] * 5
    error = await failure(up.stream())
    assert (error.code(), reason(error)) == (Code.UNAVAILABLE, "RANK_DIED")
    assert detail(error, error_details_pb2.RetryInfo()).retry_delay.ToMilliseconds() > 0
    assert detail(error, error_details_pb2.ErrorInfo()).metadata["component"] == "prefill-0/1"
    assert len(up.prefill.requests) == 3


async def test_a_bug_of_a_worker_is_not_retried(up: Deployment) -> None:
    up.prefill.refusals = [Refusal(Code.INTERNAL, "NON_FINITE_LOGITS")]
    error = await failure(up.stream())
    assert (error.code(), reason(error)) == (Code.INTERNAL, "NON_FINITE_LOGITS")
    assert len(up.prefill.requests) == 1


async def test_no_room_is_waited_out_and_is_no_failure(up: Deployment) -> None:
    up.decode.refusals = [NO_KV] * 5
    assert (await up.generate(prompt())).text == "abcd"
    assert len(up.decode.reserved) == 6


async def test_waiting_for_room_ends() -> None:
    async with Deployment(admission_wait_s=0.2) as up:
        up.decode.refusals = [NO_KV] * 100
        error = await failure(up.stream())
        assert (error.code(), reason(error)) == (Code.UNAVAILABLE, "NO_KV")
        assert detail(error, error_details_pb2.RetryInfo()).HasField("retry_delay")
        await up.assert_all_freed()


async def test_a_failure_after_the_commit_names_what_died(up: Deployment) -> None:
    up.decode.fail_after = (1, rank_died("decode-0/1"))
    seen: list[Any] = []
    error = await failure(up.stream(), seen)
    assert [event.WhichOneof("event") for event in seen] == ["delta", "delta"]
    assert (error.code(), reason(error)) == (Code.UNAVAILABLE, "RANK_DIED")
    assert detail(error, error_details_pb2.ErrorInfo()).metadata["component"] == "decode-0/1"
    assert len(up.decode.reserved) == 1


async def test_a_decode_leader_killed_in_the_stream(up: Deployment, processes: Any, repo_root: Path) -> None:
    victim = processes(
        [sys.executable, repo_root / "tests/support/fake_workers.py"], env={"PYTHONPATH": "tests"}
    )
    address = victim.wait_for_line(r"listening on (\S+)").group(1)
    await up.view.put(up.decode.info(grpc_address=address))
    seen: list[Any] = []
    ended = asyncio.ensure_future(failure(up.stream(), seen))
    await until(lambda: len(seen) > 3)
    victim.kill()
    error = await ended
    assert (error.code(), reason(error)) == (Code.UNAVAILABLE, "WORKER_LOST")
    assert detail(error, error_details_pb2.ErrorInfo()).metadata["component"] == "decode-0/0"
    assert address in status_of(error).message


async def test_a_leader_that_stops_before_the_commit_is_replaced(up: Deployment) -> None:
    up.prefills.append(FakePrefill("prefill-1/0"))
    up.prefill.may_sample.clear()
    call = asyncio.ensure_future(up.generate(prompt()))
    await until(lambda: up.prefill.num_live)
    await up.add(up.prefills[1])
    await up.prefill.stop()
    assert (await call).text == "abcd"
    assert len(up.prefills[1].requests) == 1


async def test_prefill_may_die_once_it_has_committed(up: Deployment) -> None:
    # The commit and the death race; hold the tokens back so that the death is seen in the stream.
    up.decode.pause_s = 0.02
    original = up.prefill._events

    async def dies_late(context: Any) -> AsyncIterator[Any]:
        async for event in original(context):
            if event.HasField("delivered"):
                await until(lambda: up.decode.num_sent)
                await rank_died("prefill-0/1").abort(context)
            yield event

    up.prefill._events = dies_late  # type: ignore[method-assign]
    answer = await up.generate(prompt())
    assert (answer.text, answer.usage.bytes.collective) == ("abcd", 0)


async def test_prefill_that_dies_before_delivery_fails_the_attempt(up: Deployment) -> None:
    up.decode.may_commit.clear()
    up.prefill.dies_before_delivery = True
    error = await failure(up.stream())
    assert (error.code(), reason(error)) == (Code.UNAVAILABLE, "RANK_DIED")
    assert len(up.decode.reserved) == 3


@pytest.mark.parametrize("shift", [-1, 1])
async def test_a_doubled_or_missing_token_is_a_bug(up: Deployment, shift: int) -> None:
    up.decode.index_shift = shift
    error = await failure(up.stream())
    assert (error.code(), reason(error)) == (Code.INTERNAL, "TOKEN_ORDER")


async def test_a_stream_without_finish_is_a_bug(up: Deployment) -> None:
    up.decode.ends_without_finish = True
    error = await failure(up.stream())
    assert (error.code(), reason(error)) == (Code.INTERNAL, "ENDED_EARLY")


async def test_a_live_id_is_taken(up: Deployment) -> None:
    up.prefill.may_sample.clear()
    first = asyncio.ensure_future(up.generate(prompt(request_id="r", nonce=b"1")))
    await until(lambda: up.prefill.num_live)
    for nonce in (b"", b"2"):
        error = await failure(up.stream(prompt(request_id="r", nonce=nonce)))
        assert (error.code(), reason(error)) == (Code.ALREADY_EXISTS, "REQUEST_ID_LIVE")
    up.prefill.may_sample.set()
    assert (await first).request_id == "r"
    assert (await up.generate(prompt(request_id="r"))).text == "abcd"


async def test_a_retry_with_the_nonce_takes_the_place_of_its_first_call(up: Deployment) -> None:
    up.prefill.may_sample.clear()
    first = asyncio.ensure_future(up.generate(prompt(request_id="r", nonce=b"1")))
    await until(lambda: up.prefill.num_live)
    second = asyncio.ensure_future(up.generate(prompt(request_id="r", nonce=b"1")))
    error = await failure(first)
    assert (error.code(), reason(error)) == (Code.ABORTED, "SUPERSEDED")
    up.prefill.may_sample.set()
    assert (await second).text == "abcd"
    assert [one.attempt.number for one in up.decode.reserved] == [1, 2]
