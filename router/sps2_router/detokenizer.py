"""Token ids to text, piece by piece, never half a character.

tokenizers' own DecodeStream holds text back for as long as it ends in U+FFFD: it never gives the end of a
stream that stops inside a character, and on a run of invalid bytes it holds everything (time grows with the
square). So the windowing is here; the decoding itself is the library's. Knows nothing about requests.
"""

from collections.abc import Iterable
from typing import Protocol

REPLACEMENT = "�"
# A UTF-8 character has at most 4 bytes, so one that is not complete is at most this many ids, or U+FFFDs.
MAX_INCOMPLETE = 3
# Longer windows are cut, so that a run of invalid bytes costs constant time per token.
MAX_WINDOW = 32


class Decoder(Protocol):
    """What a Detokenizer needs of a tokenizer."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that are never text."""

    def decode(self, token_ids: list[int]) -> str:
        """Text of the ids; bytes that are no UTF-8 become U+FFFD."""


class Detokenizer:
    """One stream's state. All texts of `push` and that of `flush`, joined, are the decoding of all ids."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        # The last ids that matter for what comes next, their text, and how many characters of it were given.
        self._window: list[int] = []
        self._text = ""
        self._num_given = 0
        # Where in the window the ids begin whose text was not certain when they came.
        self._boundary = 0

    def push(self, token_ids: Iterable[int]) -> str:
        """Takes the next ids and returns the text that is now certain, possibly empty."""
        return "".join([self._push(token_id) for token_id in token_ids])

    def flush(self) -> str:
        """The rest, at the end of the stream: a character cut in half becomes U+FFFD."""
        return self._give(len(self._text))

    def _push(self, token_id: int) -> str:
        if token_id in self._decoder.special_ids:
            return ""
        self._window.append(token_id)
        self._text = self._decoder.decode(self._window)
        certain = self._certain_length()
        piece = self._give(certain)
        if certain == len(self._text):
            # What came since the last boundary stays as context: decoders may treat a first id differently.
            self._keep_from(self._boundary)
            self._boundary = len(self._window)
        elif len(self._window) > MAX_WINDOW:
            self._cut()
        return piece

    def _certain_length(self) -> int:
        """Characters of the window's text that no later id can change."""
        tail = len(self._text) - len(self._text.rstrip(REPLACEMENT))
        if tail and len(self._window) - self._boundary <= MAX_INCOMPLETE:
            return self._num_given
        return len(self._text) - min(tail, MAX_INCOMPLETE)  # with a tail: more ids than a character has bytes

    def _give(self, end: int) -> str:
        piece = self._text[self._num_given : end]
        self._num_given = max(self._num_given, end)
        return piece

    def _cut(self) -> None:
        """Drops the front of the window, at a place where two separate decodings make the same text.

        At a place inside a character they do not: each half becomes a U+FFFD of its own.
        """
        for begin in range(len(self._window) - 4, 0, -1):
            front = self._decoder.decode(self._window[:begin])
            back = self._decoder.decode(self._window[begin:])
            if len(front) <= self._num_given and front + back == self._text:
                self._keep_from(begin)
                self._boundary = 0
                return

    def _keep_from(self, begin: int) -> None:
        kept = self._window[begin:]
        text = self._decoder.decode(kept)
        if text or not self._text:  # ids without text are no context
            self._num_given -= len(self._text) - len(text)
            self._window, self._text = kept, text
