"""Deltas of text: joined they are the whole text, and none of them holds half a character."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from sps2_router.detokenizer import MAX_WINDOW, REPLACEMENT, Decoder, Detokenizer
from sps2_router.tokenizer import ModelTokenizer
from support.tiny_model import BOS, EOS, VOCABULARY_SIZE, byte_ids, tiny_tokenizer

BYTE_LEVEL = ModelTokenizer(tiny_tokenizer())

any_ids = st.lists(st.integers(0, VOCABULARY_SIZE - 1), max_size=120)
# Text with characters of 1 to 4 bytes, often.
wide_text = st.text(st.sampled_from("a é€🎉ह\n") | st.characters(exclude_categories=["Cs"]), max_size=60)


def byte_fallback_tokenizer() -> ModelTokenizer:
    """As sentencepiece models have it: words with ▁, and <0xNN> for bytes that no word covers."""
    vocabulary = {"<unk>": 0, "▁hi": 1, "▁you": 2, "there": 3}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return ModelTokenizer(tokenizer)


def pieces(decoder: Decoder, token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(decoder)
    return [*(detokenizer.push([one]) for one in token_ids), detokenizer.flush()]


@given(any_ids)
def test_joined_pieces_are_the_whole_text_for_any_ids(token_ids: list[int]) -> None:
    assert "".join(pieces(BYTE_LEVEL, token_ids)) == BYTE_LEVEL.decode(token_ids)


@given(
    st.lists(
        st.sampled_from([0x61, 0x80, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x8E, 0x89, 0xFF]),
        max_size=150,
    )
)
def test_joined_pieces_are_the_whole_text_for_broken_utf8(data: list[int]) -> None:
    token_ids = byte_ids(bytes(data))
    assert "".join(pieces(BYTE_LEVEL, token_ids)) == BYTE_LEVEL.decode(token_ids)


@given(wide_text, st.data())
def test_valid_text_is_never_cut_inside_a_character(text: str, data: st.DataObject) -> None:
    token_ids = byte_ids(text.encode())
    detokenizer = Detokenizer(BYTE_LEVEL)
    given_text = []
    while token_ids:
        count = data.draw(st.integers(1, 5))
        given_text.append(detokenizer.push(token_ids[:count]))
        token_ids = token_ids[count:]
    given_text.append(detokenizer.flush())
    assert "".join(given_text) == text
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in given_text)


@given(st.lists(st.sampled_from([" hi", " you", "there", "€", "🎉", "é"]), max_size=30))
def test_words_and_byte_fallback(words: list[str]) -> None:
    decoder = byte_fallback_tokenizer()
    known = {" hi": [1], " you": [2], "there": [3]}
    token_ids = [one for word in words for one in known.get(word) or [4 + byte for byte in word.encode()]]
    got = pieces(decoder, token_ids)
    assert "".join(got) == decoder.decode(token_ids)
    assert not any(REPLACEMENT in piece for piece in got)


def test_a_character_comes_with_its_last_byte() -> None:
    assert pieces(BYTE_LEVEL, byte_ids("a€b".encode())) == ["a", "", "", "€", "b", ""]


def test_special_tokens_are_no_text() -> None:
    assert pieces(BYTE_LEVEL, [BOS, *byte_ids(b"hi"), EOS]) == ["", "h", "i", "", ""]


def test_the_end_of_a_stream_gives_what_was_held_back() -> None:
    assert pieces(BYTE_LEVEL, byte_ids(b"a\xe2\x82")) == ["a", "", "", REPLACEMENT]


def test_a_true_replacement_character_is_text() -> None:
    assert "".join(pieces(BYTE_LEVEL, byte_ids(f"{REPLACEMENT}{REPLACEMENT} a".encode()))) == "�� a"


@pytest.mark.parametrize("byte", [0xC3, 0x80, 0xFF])
def test_a_run_of_invalid_bytes_neither_blocks_nor_slows_down(byte: int) -> None:
    detokenizer = Detokenizer(BYTE_LEVEL)
    start = time.perf_counter()
    text = "".join(detokenizer.push(byte_ids(bytes([byte]))) for _ in range(5_000))
    assert len(text) > 4_900
    assert len(detokenizer._window) <= MAX_WINDOW + 1
    # With the whole run decoded again for each token this takes minutes.
    assert time.perf_counter() - start < 5
