"""Tokens to events: numbering, indices, digest, text."""

import hashlib
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sps2.v1 import generation_pb2
from sps2_router.detokenizer import Detokenizer
from sps2_router.relay import ChoiceRelay, StreamEvents
from sps2_router.tokenizer import ModelTokenizer
from sps2_router.types import TokenChoice
from sps2_service.errors import Internal
from support.tiny_model import EOS, VOCABULARY_SIZE, byte_ids, tiny_tokenizer

DECODER = ModelTokenizer(tiny_tokenizer())
STOP = generation_pb2.FINISH_REASON_STOP
LENGTH = generation_pb2.FINISH_REASON_LENGTH


def relay(*stop_token_ids: int, events: StreamEvents | None = None, **choice: Any) -> ChoiceRelay:
    chosen = TokenChoice(0.0, 1.0, -1, 0, stop_token_ids, 100, **choice)
    return ChoiceRelay(events or StreamEvents("r"), Detokenizer(DECODER), chosen)


@given(
    st.lists(st.lists(st.integers(0, VOCABULARY_SIZE - 1), min_size=1, max_size=4), min_size=1, max_size=20)
)
def test_any_stream_adds_up(messages: list[list[int]]) -> None:
    numbers = StreamEvents("r")
    stream = relay(50, EOS, events=numbers)
    events = [stream.tokens(stream.num_tokens, ids) for ids in messages]
    events += stream.finish(STOP)
    events.append(numbers.usage(generation_pb2.Usage()))
    token_ids = [one for ids in messages for one in ids]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.request_id for event in events if event.request_id] == ["r"]
    deltas = [event.delta for event in events if event.HasField("delta")]
    assert [one for delta in deltas for one in delta.token_ids] == token_ids
    text = DECODER.decode([one for one in token_ids if one not in (50, EOS)])
    assert "".join(delta.text for delta in deltas) == text
    finish = events[-2].finish
    assert (finish.reason, finish.token_count) == (STOP, len(token_ids))
    packed = b"".join(struct.pack("<i", one) for one in token_ids)
    assert finish.digest == hashlib.sha256(packed).digest()


@pytest.mark.parametrize("first_index", [0, 1, 3])
def test_only_the_next_index_is_taken(first_index: int) -> None:
    stream = relay()
    stream.tokens(0, byte_ids(b"ab"))
    with pytest.raises(Internal, match="TOKEN_ORDER"):
        stream.tokens(first_index, byte_ids(b"c"))


def test_an_empty_message_is_a_bug() -> None:
    with pytest.raises(Internal, match="TOKEN_ORDER"):
        relay().tokens(0, [])


def test_an_end_without_a_reason_is_a_bug() -> None:
    with pytest.raises(Internal, match="NO_FINISH_REASON"):
        relay().finish(generation_pb2.FINISH_REASON_UNSPECIFIED)


def feed(stream: ChoiceRelay, text: bytes) -> tuple[str, int]:
    """The text that the client gets and the tokens that are counted, a token for each byte."""
    pieces = []
    for token in byte_ids(text):
        pieces.append(stream.tokens(stream.num_tokens, [token]).delta.text)
        if stream.stopped:
            break
    pieces += [event.delta.text for event in stream.finish(LENGTH) if event.HasField("delta")]
    return "".join(pieces), stream.num_tokens


def test_a_stop_string_across_tokens_cuts_the_text_and_ends_the_count() -> None:
    stream = relay(stop_strings=("END", "xyz"))
    assert feed(stream, b"one ENEND two") == ("one EN", 9)
    assert stream.stopped


def test_what_looked_like_a_stop_string_comes_with_the_end() -> None:
    stream = relay(stop_strings=("END",))
    assert feed(stream, b"the EN") == ("the EN", 6)
    assert not stream.stopped


def test_a_stop_string_may_be_half_of_what_the_tokens_say() -> None:
    """A character of four tokens is matched whole, never by its bytes."""
    assert feed(relay(stop_strings=("🎉",)), "é🎉é".encode()) == ("é", 6)
    assert feed(relay(stop_strings=("©",)), "🎩é".encode()) == ("🎩é", 6)


def test_tokens_behind_a_stop_string_in_one_message_are_overrun() -> None:
    stream = relay(stop_strings=("b",))
    logprobs = [generation_pb2.TokenLogprob(logprob=-one) for one in (1.0, 2.0, 3.0)]
    event = stream.tokens(0, byte_ids(b"abc"), logprobs)
    assert (event.delta.text, list(event.delta.token_ids)) == ("a", byte_ids(b"ab"))
    assert list(event.delta.logprobs) == logprobs[:2]
    (finish,) = stream.finish(STOP)
    assert (finish.finish.token_count, finish.finish.reason) == (2, STOP)
    assert finish.finish.digest == hashlib.sha256(struct.pack("<2i", *byte_ids(b"ab"))).digest()


def test_stop_strings_wait_for_min_tokens() -> None:
    assert feed(relay(stop_strings=("b",), min_tokens=4), b"abcabc") == ("abca", 5)
    assert feed(relay(stop_strings=("ca",), min_tokens=4), b"abcabc") == ("ab", 4)
