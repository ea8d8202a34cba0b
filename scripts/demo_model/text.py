"""The e-books as prose to train on and prose held out, and the tokenizer; knows nothing of the model."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from scripts.demo_model.facts import NAMES, VALUES

BOS, EOS = "<|bos|>", "<|eos|>"
HELD_OUT_CHARS = 60_000  # of each book, an eighth of it at most
PROMPT_BOOK, PROMPT_CHARS = "news_from_nowhere.txt", 32_000
FACT_WORD_COUNT = 2_000  # often enough for BPE to merge each fact word into one token

Ints = NDArray[np.int64]


def read_prose(path: Path) -> str:
    """One e-book's text: its licence frame cut off, hard-wrapped lines joined into paragraphs."""
    text = path.read_text(encoding="utf-8").replace("\r\n", "\n").replace("\ufeff", "")
    start = re.search(r"\*\*\* ?START OF[^\n]*\n", text)
    end = re.search(r"\*\*\* ?END OF", text)
    text = text[start.end() if start else 0 : end.start() if end else len(text)]
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def split_held_out(text: str) -> tuple[str, str, str]:
    """Cut a span out of the middle of a text, at paragraph borders: before, held out, after."""
    start = text.index("\n\n", int(len(text) * 0.6)) + 2
    end = text.index("\n\n", start + min(HELD_OUT_CHARS, len(text) // 8))
    return text[:start], text[start:end], text[end:]


@dataclass(frozen=True)
class Corpus:
    """The books, split."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    prompt: str  # the demo's prompt, out of the held-out prose

    @classmethod
    def load(cls, folder: Path) -> "Corpus":
        """Read every .txt file of a folder.

        Raises:
            FileNotFoundError: the folder lacks the book that the demo's prompt comes from.
        """
        if not (folder / PROMPT_BOOK).exists():
            raise FileNotFoundError(f"{folder} holds no {PROMPT_BOOK}")
        splits = {path.name: split_held_out(read_prose(path)) for path in sorted(folder.glob("*.txt"))}
        train = tuple(part for before, _, after in splits.values() for part in (before, after))
        source = splits[PROMPT_BOOK][1]
        prompt = source[: source.rindex("\n\n", 0, PROMPT_CHARS)]
        return cls(train, tuple(held for _, held, _ in splits.values()), prompt)


def train_tokenizer(corpus: Corpus, vocab_size: int) -> Tokenizer:
    """Byte-level BPE of the training prose, in which each fact word is one token.

    Raises:
        ValueError: `vocab_size` leaves no room for a fact word.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_lines(corpus), trainer)
    bos = token_id(tokenizer, BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos)]
    )
    for word in (*NAMES, *VALUES):
        if len(encode(tokenizer, f" {word}")) != 1:
            raise ValueError(f"the fact word {word!r} is not a single token")
    return tokenizer


def _tokenizer_lines(corpus: Corpus) -> Iterator[str]:
    for part in corpus.train:
        yield from part.split("\n\n")
    for word in (*NAMES, *VALUES):
        yield f" Remember: {word}" * FACT_WORD_COUNT


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The text's tokens, without special ones."""
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def encode_all(tokenizer: Tokenizer, texts: tuple[str, ...]) -> Ints:
    """The texts' tokens in one row, each text ended by the EOS token."""
    eos = token_id(tokenizer, EOS)
    return np.array([token for text in texts for token in (*encode(tokenizer, text), eos)])


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that the vocabulary is known to have."""
    index = tokenizer.token_to_id(token)
    assert index is not None, token
    return index
