"""Tokens to events: numbering, indices, digest, text."""

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sps2.v1 import generation_pb2
from sps2_router.detokenizer import Detokenizer
from sps2_router.relay import ChoiceRelay
from sps2_router.tokenizer import ModelTokenizer
from sps2_service.errors import Internal
from support.tiny_model import EOS, VOCABULARY_SIZE, byte_ids, tiny_tokenizer

DECODER = ModelTokenizer(tiny_tokenizer())
STOP = generation_pb2.FINISH_REASON_STOP


def relay(*stop_token_ids: int) -> ChoiceRelay:
    return ChoiceRelay("r", Detokenizer(DECODER), stop_token_ids)


@given(
    st.lists(st.lists(st.integers(0, VOCABULARY_SIZE - 1), min_size=1, max_size=4), min_size=1, max_size=20)
)
def test_any_stream_adds_up(messages: list[list[int]]) -> None:
    stream = relay(50, EOS)
    events = [stream.tokens(stream.num_tokens, ids) for ids in messages]
    events += stream.finish(STOP)
    events.append(stream.usage(generation_pb2.Usage()))
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
