"""The contract of a stream, event by event, without a channel."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sps2.v1 import generation_pb2
from sps2_client import Choice, Finished, Generation, ProtocolError, Received, TextDelta, TokenLogprob
from sps2_client._assembly import Assembly, token_digest
from support.fake_router import Response, delta, finish, good_events, numbered, usage


def play(events: list[Response], num_choices: int = 1) -> Generation:
    assembly = Assembly("r", num_choices)
    for event in numbered(events):
        assembly.take(event)
    return assembly.complete()


def test_digest_is_over_little_endian_int32() -> None:
    assert token_digest([1, 258]) == hashlib.sha256(b"\x01\0\0\0\x02\x01\0\0").digest()
    assert token_digest([]) == hashlib.sha256(b"").digest()


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=4), max_size=6))
def test_any_cutting_into_deltas_gives_the_same_tokens(chunks: list[list[int]]) -> None:
    whole = [one for chunk in chunks for one in chunk]
    events, count = [], 0
    for chunk in chunks:
        events.append(delta("x", chunk, count))
        count += len(chunk)
    assert play([*events, finish(whole), usage()]).token_ids == tuple(whole)


def test_text_without_tokens_is_taken_wherever_its_index_points() -> None:
    assert play([delta("a", [1], 0), delta("b", [], 0), finish([1]), usage()]).text == "ab"


def test_events_as_dataclasses() -> None:
    assembly = Assembly("mine")
    events = [assembly.take(one) for one in numbered(good_events(), "drawn")]
    assert events[0] == TextDelta("Hel", (5,), 0)
    assert events[3] == Finished("length", 3)
    assert assembly.request_id == "drawn"


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ([], "MISSING_FINISH"),
        ([usage()], "MISSING_FINISH"),
        ([delta("a", [1], 1)], "TOKEN_INDEX"),
        ([finish([]), delta("a", [1], 0)], "EVENT_AFTER_FINISH"),
        ([finish([], reason=0)], "UNKNOWN_EVENT"),
        ([Response()], "UNKNOWN_EVENT"),
        ([Response(choice_index=1)], "UNKNOWN_CHOICE"),
        ([Response(choice_index=-1)], "UNKNOWN_CHOICE"),
    ],
)
def test_what_breaks_the_contract(events: list[Response], reason: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        play(events)
    assert caught.value.reason == reason
    assert caught.value.request_id == "r"


def of_choice(index: int, event: Response) -> Response:
    event.choice_index = index
    return event


def test_choices_are_gathered_apart() -> None:
    events = [
        of_choice(1, delta("b", [2], 0)),
        delta("a", [1], 0),
        of_choice(1, delta("c", [3], 1)),
        of_choice(1, finish([2, 3])),
        finish([1]),
        usage(),
    ]
    answer = play(events, 2)
    assert (answer.text, answer.token_ids) == ("a", (1,))
    assert answer.more_choices == (Choice("bc", (2, 3), "length"),)
    assert answer.choices == (Choice("a", (1,), "length"), *answer.more_choices)


@pytest.mark.parametrize("ends", [[finish([])], [finish([]), usage()]])
def test_a_choice_that_never_came_is_missed(ends: list[Response]) -> None:
    with pytest.raises(ProtocolError) as caught:
        play(ends, 2)
    assert caught.value.reason == "MISSING_FINISH"


def test_what_came_of_every_choice_goes_with_an_error() -> None:
    assembly = Assembly("r", num_choices=2)
    assembly.take(Response(delta=generation_pb2.Delta(text="a", token_ids=[1])))
    other = Response(sequence_number=1, choice_index=1)
    other.delta.CopyFrom(generation_pb2.Delta(text="b", token_ids=[2]))
    assembly.take(other)
    assert assembly.received == Received("a", (1,), (Received("b", (2,)),))


def test_logprobs_stay_with_their_tokens() -> None:
    event = delta("a", [1], 0)
    event.delta.logprobs.append(
        generation_pb2.TokenLogprob(logprob=-0.5, top_token_ids=[1, 7], top_logprobs=[-0.5, -2])
    )
    answer = play([event, finish([1]), usage()])
    assert answer.logprobs == (TokenLogprob(-0.5, ((1, -0.5), (7, -2.0))),)
