"""The router over real gRPC. What a client gets when all goes well."""

import asyncio
import hashlib
import json
import struct
from pathlib import Path

import pytest

from sps2.v1 import (
    generation_pb2,
)
from sps2_layout.attention import Attention
from sps2_layout.profile_file import load_profile
from sps2_layout.profiles import EXACT
from sps2_layout.wire import unpack_attention
from support.router_deployment import (
    Code,
    Deployment,
    failure,
    fields,
    prompt,
    reason,
    until,
)
from support.tiny_model import BOS, EOS, VOCABULARY_SIZE, byte_ids

pytestmark = pytest.mark.service


async def test_streams_an_answer(up: Deployment) -> None:
    events = [event async for event in up.stream(prompt(request_id="r-1"))]
    ids = byte_ids(b"abcd")
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.request_id for event in events] == ["r-1", *[""] * (len(events) - 1)]
    deltas = [event.delta for event in events if event.HasField("delta")]
    assert "".join(delta.text for delta in deltas) == "abcd"
    assert [(delta.first_index, *delta.token_ids) for delta in deltas] == list(enumerate(ids))
    assert [event.WhichOneof("event") for event in events[-2:]] == ["finish", "usage"]
    finish, usage = events[-2].finish, events[-1].usage
    assert finish.reason == generation_pb2.FINISH_REASON_LENGTH
    assert finish.token_count == 4
    assert finish.digest == hashlib.sha256(struct.pack("<4i", *ids)).digest()
    assert (usage.output_tokens, usage.attention_profile) == (4, "exact")
    assert (usage.bytes.collective, usage.bytes.q_exchange, usage.bytes.kv_transfer) == (100, 200, 300)
    timings = usage.timings
    assert 0 <= timings.queue <= timings.ttft <= timings.e2e
    assert timings.ttft >= timings.queue + timings.prefill + timings.transfer
    assert timings.tpot > 0


async def test_the_mask_goes_to_both_leaders(up: Deployment) -> None:
    await up.generate(prompt("hello", attention_profile="paper"))
    prefill, reserve = up.prefill.requests[0], up.decode.reserved[0]
    assert unpack_attention(prefill.attention) == Attention.admit(EXACT, 2)  # too short for anything else
    assert reserve.attention == prefill.attention


async def test_the_deployments_own_profile(tmp_path: Path) -> None:
    path = tmp_path / "tiny.json"
    rung = {"shards": 2, "levels": [[1, 1], [2, 2]], "tail": 1}
    path.write_text(json.dumps({"min_shard_tokens": 1, "profiles": [rung]}))
    async with Deployment(profile=str(path)) as up:
        answer = await up.generate(prompt("hello"))
        assert answer.usage.attention_profile == "tiny: N=2 A=2 levels (1,1),(2,2) sampled tail 1 sinks 0"
        assert (
            await up.generate(prompt("hello", attention_profile="exact"))
        ).usage.attention_profile == "exact"
        expected = Attention.admit(load_profile(str(path)), 2)
        assert unpack_attention(up.prefill.requests[0].attention) == expected
        assert up.prefill.requests[1].attention.HasField("exact")


async def test_workers_get_the_resolved_request(up: Deployment) -> None:
    await up.generate(
        prompt(
            "hello",
            sampling=generation_pb2.SamplingSpec(temperature=0.5, top_p=0.5, top_k=0, seed=7),
            stop=generation_pb2.StopSpec(max_tokens=9, stop_token_ids=[20, EOS]),
        )
    )
    prefill, reserve = up.prefill.requests[0], up.decode.reserved[0]
    assert list(prefill.token_ids) == [BOS, VOCABULARY_SIZE - 3]
    assert prefill.choice == reserve.choice
    assert prefill.attempt == reserve.attempt
    assert (prefill.attempt.number, len(prefill.attempt.request_id)) == (1, 32)
    assert prefill.placement.group == "decode-0"
    assert (reserve.num_prompt_tokens, reserve.prefill_group, reserve.model_hash) == (2, "prefill-0", "hash")
    assert up.decode.started == [up.prefill.first_token]
    choice = prefill.choice
    assert (choice.max_tokens, list(choice.stop_token_ids)) == (9, [EOS, 20])
    assert choice.sampling == generation_pb2.SamplingSpec(
        temperature=0.5,
        top_p=0.5,
        top_k=-1,
        seed=7,
        min_p=0,
        repetition_penalty=1,
        presence_penalty=0,
        frequency_penalty=0,
    )
    assert (choice.num_choices, list(choice.prompt_token_ids), choice.HasField("num_logprobs")) == (
        1,
        [],
        False,
    )


async def test_a_repetition_penalty_takes_the_prompt_along(up: Deployment) -> None:
    ids = generation_pb2.TokenIds(ids=[7, 5, 7])
    sampling = generation_pb2.SamplingSpec(repetition_penalty=2)
    await up.generate(generation_pb2.GenerationSpec(token_ids=ids, sampling=sampling))
    for choice in (up.prefill.requests[0].choice, up.decode.reserved[0].choice):
        assert list(choice.prompt_token_ids) == [5, 7]


async def test_generates_a_whole_answer(up: Deployment) -> None:
    ids = generation_pb2.TokenIds(ids=[5, 6, 7])
    answer = await up.generate(generation_pb2.GenerationSpec(token_ids=ids, model="tiny"))
    assert (answer.text, list(answer.token_ids)) == ("abcd", byte_ids(b"abcd"))
    assert (answer.finish.token_count, answer.usage.prompt_tokens) == (4, 3)
    assert answer.request_id


async def test_characters_that_span_tokens_come_whole(up: Deployment) -> None:
    up.decode.tokens = byte_ids("€🎉".encode())
    texts = [event.delta.text async for event in up.stream() if event.HasField("delta")]
    assert texts == ["a", "", "", "€", "", "", "", "🎉"]


async def test_a_stream_cut_inside_a_character_gives_the_rest_with_the_end(up: Deployment) -> None:
    up.decode.tokens = byte_ids("€".encode())[:2]
    answer = await up.generate(prompt())
    assert (answer.text, answer.finish.token_count) == ("a�", 3)


async def test_stop_tokens_count_but_are_no_text(up: Deployment) -> None:
    up.decode.tokens = byte_ids(b"bZ")
    up.decode.reason = generation_pb2.FINISH_REASON_STOP
    answer = await up.generate(prompt(stop=generation_pb2.StopSpec(stop_token_ids=byte_ids(b"Z"))))
    assert (answer.text, answer.usage.output_tokens) == ("ab", 3)
    assert answer.finish.reason == generation_pb2.FINISH_REASON_STOP


async def test_a_first_token_that_finishes_does_not_wait_for_decode(up: Deployment) -> None:
    up.prefill.finish_reason = generation_pb2.FINISH_REASON_LENGTH
    events = [event async for event in up.stream()]
    assert [event.WhichOneof("event") for event in events] == ["delta", "finish", "usage"]
    assert events[-1].usage.bytes.collective == 100
    assert events[-1].usage.timings.transfer == 0
    await up.assert_all_freed()
    assert up.decode.started == []


async def test_nothing_is_sent_before_the_commit(up: Deployment) -> None:
    up.decode.may_commit.clear()
    call = up.stream()
    await until(lambda: up.decode.started)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await asyncio.shield(asyncio.ensure_future(call.initial_metadata()))
    up.decode.may_commit.set()
    assert len([event async for event in call]) == 6


async def test_a_prompt_near_the_message_limit(up: Deployment) -> None:
    error = await failure(up.stream(prompt("x" * (31 * 1024 * 1024))))
    assert (error.code(), fields(error)) == (Code.OUT_OF_RANGE, ["spec.text"])
    ids = generation_pb2.TokenIds(ids=[200] * 3_000_000)
    error = await failure(up.stream(generation_pb2.GenerationSpec(token_ids=ids)))
    assert (error.code(), fields(error)) == (Code.OUT_OF_RANGE, ["spec.prompt"])


async def test_a_stop_string_ends_the_call_and_the_overrun_is_not_counted(up: Deployment) -> None:
    up.decode.tokens = byte_ids(b"bcdefgh" * 50)
    up.decode.pause_s = 0.01
    spec = prompt(stop=generation_pb2.StopSpec(max_tokens=500, stop_strings=["efb", "fg"]))
    answer = await up.generate(spec)
    assert (answer.text, answer.finish.reason) == ("abcde", generation_pb2.FINISH_REASON_STOP)
    assert answer.usage.output_tokens == answer.finish.token_count == len(answer.token_ids) == 7
    await up.assert_all_freed()
    assert up.decode.num_cancelled == 1
    assert up.decode.num_sent < 100


async def test_a_stop_string_in_the_first_token(up: Deployment) -> None:
    answer = await up.generate(prompt(stop=generation_pb2.StopSpec(stop_strings=["a"])))
    assert (answer.text, answer.usage.output_tokens) == ("", 1)


async def test_logprobs_come_with_their_tokens(up: Deployment) -> None:
    up.prefill.logprob = generation_pb2.TokenLogprob(logprob=-1, top_token_ids=[3], top_logprobs=[-0.5])
    up.decode.logprob = generation_pb2.TokenLogprob(logprob=-2)
    up.decode.tokens_by_choice = {0: byte_ids(b"bc")}
    answer = await up.generate(prompt(num_logprobs=1))
    assert list(answer.logprobs) == [up.prefill.logprob, up.decode.logprob, up.decode.logprob]
    assert up.prefill.requests[0].choice.num_logprobs == 1


async def test_choices_are_told_apart(up: Deployment) -> None:
    """One is stopped by its text, the others end by themselves; usage counts all tokens but the overrun."""
    up.decode.tokens_by_choice = {0: byte_ids(b"xyz"), 1: byte_ids(b"pstopq"), 2: byte_ids(b"k")}
    up.decode.pause_s = 0.01
    spec = prompt(num_choices=3, stop=generation_pb2.StopSpec(stop_strings=["stop"]))
    events = [event async for event in up.stream(spec)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].HasField("usage")
    finishes = {event.choice_index: event.finish for event in events if event.HasField("finish")}
    assert {index: one.token_count for index, one in finishes.items()} == {0: 4, 1: 6, 2: 2}
    assert finishes[1].reason == generation_pb2.FINISH_REASON_STOP
    assert events[-1].usage.output_tokens == 12
    assert events[-1].usage.bytes.q_exchange == 600
    answer = await up.generate(spec)
    assert [answer.text, *(one.text for one in answer.more_choices)] == ["axyz", "ap", "ak"]
    await up.assert_all_freed()
    assert up.decode.stopped == [1, 1]
    start = up.decode.starts[0]
    assert (list(start.more_first_token_ids), list(start.finished_choices)) == (byte_ids(b"aa"), [])


async def test_choices_that_all_end_with_their_first_token(up: Deployment) -> None:
    up.prefill.finish_reason = generation_pb2.FINISH_REASON_LENGTH
    answer = await up.generate(prompt(num_choices=2))
    assert [answer.finish.token_count, answer.more_choices[0].finish.token_count] == [1, 1]
    assert up.decode.starts == []


async def test_a_choice_that_was_not_asked_for_is_a_bug(up: Deployment) -> None:
    up.decode.tokens_by_choice = {5: byte_ids(b"x")}
    error = await failure(up.stream(prompt()))
    assert (error.code(), reason(error)) == (Code.INTERNAL, "UNKNOWN_CHOICE")
