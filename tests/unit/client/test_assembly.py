"""The contract of a stream, event by event, without a channel."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sps2_client import Finished, Generation, ProtocolError, TextDelta
from sps2_client._assembly import Assembly, token_digest
from support.fake_router import Response, delta, finish, good_events, numbered, usage


def play(events: list[Response]) -> Generation:
    assembly = Assembly("r")
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
    ],
)
def test_what_breaks_the_contract(events: list[Response], reason: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        play(events)
    assert caught.value.reason == reason
    assert caught.value.request_id == "r"
