"""The router over real gRPC. Leaders that fail: unseen before the commit point, a typed error after it."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from google.rpc import error_details_pb2

from sps2.v1 import cluster_pb2, generation_pb2
from sps2_layout.block_hash import BLOCK_TOKENS, block_hashes
from sps2_router.front_door import tenant_salt
from sps2_router.policies import POLICIES
from support.fake_workers import NO_KV, PREEMPTED, FakeDecode, FakePrefill, Refusal, rank_died
from support.router_deployment import (
    Code,
    Deployment,
    detail,
    failure,
    prompt,
    reason,
    until,
)
from support.tiny_model import byte_ids

pytestmark = pytest.mark.service


@pytest.mark.parametrize("policy", POLICIES)
async def test_failures_before_the_commit_are_not_seen(policy: str) -> None:
    """Each attempt is made on groups that none has failed on, whichever policy picks them."""
    async with Deployment(policy=policy) as up:
        up.prefills.append(FakePrefill("prefill-1/0"))
        up.decodes.append(FakeDecode("decode-1/0"))
        await up.add(up.prefills[1], up.decodes[1])
        up.prefill.refusals = [rank_died("prefill-0/1")]
        up.decodes[1].refuse_commit = [rank_died("decode-1/1")]
        answer = await up.generate(prompt())
        assert answer.text == "abcd"
        assert [one.attempt.number for one in up.decode.reserved] == [1, 3]
        assert [one.attempt.number for one in up.decodes[1].reserved] == [2]
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


async def test_a_failure_after_the_commit_is_not_seen_either(up: Deployment) -> None:
    up.decode.fail_after = [(1, rank_died("decode-0/1"))]
    events = [event async for event in up.stream()]
    deltas = [event.delta for event in events if event.HasField("delta")]
    assert [(delta.first_index, delta.text) for delta in deltas] == list(enumerate("abcd"))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.WhichOneof("event") for event in events[-2:]] == ["finish", "usage"]
    usage = events[-1].usage
    assert (usage.output_tokens, usage.prompt_tokens) == (4, len(up.prefill.requests[0].token_ids))
    assert (usage.bytes.collective, usage.bytes.q_exchange, usage.bytes.kv_transfer) == (200, 200, 600)


async def test_what_an_attempt_that_goes_on_is_asked_for(up: Deployment) -> None:
    up.decode.fail_after = [(1, rank_died("decode-0/1"))]
    await up.generate(prompt(sampling=generation_pb2.SamplingSpec(repetition_penalty=2), priority=-3))
    (first, second), (before, after) = up.prefill.requests, up.decode.reserved
    given = byte_ids(b"ab")
    assert list(second.token_ids) == [*first.token_ids, *given]
    assert second.attention == first.attention == after.attention
    assert second.choice == after.choice
    assert list(after.choice.generated_token_ids) == given
    assert after.num_prompt_tokens == before.num_prompt_tokens + 2
    assert after.asked_at_us == before.asked_at_us > 0
    assert after.priority == before.priority == -3
    after.choice.ClearField("generated_token_ids")
    assert after.choice == before.choice
    assert [one.attempt.number for one in (before, after)] == [1, 2]


async def test_every_attempt_names_the_prompts_full_blocks(up: Deployment) -> None:
    """Those alone: what was generated since is not named."""
    ids = [index % 50 for index in range(2 * BLOCK_TOKENS + 63)]
    up.decode.fail_after = [(1, rank_died("decode-0/1"))]
    await up.generate(generation_pb2.GenerationSpec(token_ids=generation_pb2.TokenIds(ids=ids)))
    names = block_hashes(ids, "hash", tenant_salt(""))
    assert len(names) == 2
    assert [list(one.block_hashes) for one in up.decode.reserved] == [names, names]


async def test_when_attempts_are_used_up_the_stream_ends_with_what_died(up: Deployment) -> None:
    up.prefill.tokens = up.decode.tokens = byte_ids(b"bcdefghijk")
    up.decode.fail_after = [(1, rank_died("decode-0/1"))] * 3
    seen: list[Any] = []
    error = await failure(up.stream(), seen)
    assert "".join(event.delta.text for event in seen) == "abcdef"
    assert (error.code(), reason(error)) == (Code.UNAVAILABLE, "RANK_DIED")
    assert detail(error, error_details_pb2.ErrorInfo()).metadata["component"] == "decode-0/1"
    assert len(up.decode.reserved) == 3


async def test_preemptions_are_not_counted() -> None:
    """Nor is it room that is waited for in between, for longer than a new request would wait."""
    async with Deployment(admission_wait_s=0.1) as up:
        up.prefill.tokens = up.decode.tokens = byte_ids(b"bcdefghijk")
        up.decode.refuse_commit = [PREEMPTED] * 3
        up.decode.fail_after = [(1, PREEMPTED)] * 3
        answer = up.stream()
        seen = []
        async for event in answer:
            seen.append(event)
            if event.sequence_number == 0:
                up.decode.refusals = [NO_KV] * 10
        assert "".join(event.delta.text for event in seen) == "abcdefghijk"
        assert len(up.decode.reserved) == 3 + 3 + 10 + 1
        await up.assert_all_freed()


async def test_waiting_for_room_is_no_silence() -> None:
    async with Deployment(max_silence_s=1.0) as up:
        up.decode.fail_after = [(1, PREEMPTED)]
        text = ""
        async for event in up.stream():
            if not text:
                up.decode.refusals = [replace(NO_KV, retry_after=0.2)] * 8
            text += event.delta.text
        assert text == "abcd"


async def test_what_the_last_tokens_end_is_over_though_nobody_said_so(up: Deployment) -> None:
    up.decode.fail_after = [(3, rank_died("decode-0/1"))]
    answer = await up.generate(prompt(stop=generation_pb2.StopSpec(max_tokens=4)))
    assert (answer.text, answer.finish.reason) == ("abcd", generation_pb2.FINISH_REASON_LENGTH)
    assert len(up.decode.reserved) == 1


async def test_text_goes_on_across_attempts(up: Deployment) -> None:
    """Half a character, and half of a stop string, when the attempt dies."""
    up.prefill.tokens = up.decode.tokens = byte_ids("€xstopy".encode())
    up.decode.fail_after = [(2, rank_died("decode-0/1")), (3, rank_died("decode-0/1"))]
    answer = await up.generate(prompt(stop=generation_pb2.StopSpec(stop_strings=["stop"])))
    assert (answer.text, answer.finish.reason) == ("a€x", generation_pb2.FINISH_REASON_STOP)
    assert answer.finish.token_count == 9
    assert len(up.decode.reserved) == 3


async def test_choices_go_on_one_by_one(up: Deployment) -> None:
    up.decode.tokens_by_choice = {0: byte_ids(b"bcdef"), 1: byte_ids(b"pqstopr"), 2: byte_ids(b"klmnop")}
    up.prefill.tokens_by_choice = up.decode.tokens_by_choice
    up.decode.fail_after = [(4, rank_died("decode-0/1"))]
    spec = prompt(num_choices=3, stop=generation_pb2.StopSpec(stop_strings=["st"]))
    answer = await up.generate(spec)
    assert [answer.text, *(one.text for one in answer.more_choices)] == ["abcdef", "apq", "aklmnop"]
    assert sorted(
        (one.choice.num_choices, one.choice.sampling.first_choice, one.attempt.number)
        for one in up.decode.reserved
    ) == [(1, 0, 2), (1, 2, 3), (3, 0, 1)]
    await up.assert_all_freed()


async def test_a_decode_leader_killed_in_the_stream(up: Deployment, processes: Any, repo_root: Path) -> None:
    up.decodes.append(FakeDecode("decode-1/0"))
    up.prefill.tokens = up.decodes[1].tokens = [ord("b") + 2] * 400
    path = os.pathsep.join(["tests", os.environ.get("PYTHONPATH", "")])
    victim = processes(
        [sys.executable, repo_root / "tests/support/fake_workers.py"], env={"PYTHONPATH": path}
    )
    address = victim.wait_for_line(r"listening on (\S+)").group(1)
    await up.view.put(up.decode.info(grpc_address=address))
    seen: list[Any] = []
    async for event in up.stream(timeout=60):  # 400 tokens, also on a busy machine
        seen.append(event)
        if len(seen) == 3:
            await up.add(up.decodes[1])
            victim.kill()
    assert [one.delta.first_index for one in seen if one.HasField("delta")] == list(range(401))
    assert seen[-2].finish.token_count == 401
    assert 3 <= len(up.decodes[1].reserved[0].choice.generated_token_ids) < 400


async def test_a_dead_leader_is_outwaited_by_a_live_stream(up: Deployment) -> None:
    """It stays in the directory for a while; then another takes its place."""
    up.prefill.tokens = up.decode.tokens = byte_ids(b"bcdefghijk")
    up.decode.fail_after = [(1, rank_died("decode-0/0"))]
    up.decode.pause_s = 0.05
    text = ""
    async for event in up.stream():
        text += event.delta.text
        if text == "a":
            await up.view.put(up.decode.info(grpc_address="127.0.0.1:1"))
            back = asyncio.create_task(_later(3.0, up.view.put(up.decode.info())))
    await back
    assert text == "abcdefghijk"


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


async def _later(delay_s: float, work: Coroutine[Any, Any, None]) -> None:
    await asyncio.sleep(delay_s)
    await work


def draining(group: str) -> Refusal:
    return Refusal(Code.UNAVAILABLE, "GROUP_DRAINING", retry_after=1.0, metadata={"component": group})


async def test_a_group_that_drains_is_no_failure_in_any_phase() -> None:
    """Refused by a prefill group whose drain is news, then handed back by a decode group amid its tokens."""
    async with Deployment(max_attempts=1) as up:
        up.prefills.append(FakePrefill("prefill-1/0"))
        up.decodes.append(FakeDecode("decode-1/0"))
        await up.add(up.prefills[1], up.decodes[1])
        up.prefill.refusals = [draining("prefill-0")]
        up.decodes[1].fail_after = [(1, draining("decode-1"))]
        answer = await up.generate(prompt())
        assert answer.text == "abcd"
        assert [one.attempt.number for one in up.prefills[1].requests] == [2, 3]
        assert [one.attempt.number for one in up.decode.reserved] == [1, 3]


async def test_the_last_group_that_drains_is_waited_for_then_said() -> None:
    async with Deployment(regroup_wait_s=0.3) as up:
        up.decode.fail_after = [(1, draining("decode-0"))] * 50
        failing = asyncio.ensure_future(failure(up.stream()))
        await until(lambda: bool(up.decode.started))
        await up.view.put(up.prefill.info(), up.decode.info(state=cluster_pb2.WORKER_STATE_DRAINING))
        error = await failing
        assert (error.code(), reason(error)) == (Code.UNAVAILABLE, "NO_READY_GROUP")
        assert detail(error, error_details_pb2.RetryInfo()).HasField("retry_delay")
        assert "decode-0 is draining" in (error.details() or "")
