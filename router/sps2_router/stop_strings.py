"""Finds stop strings in text that comes in pieces, wherever they are cut. Pure; knows nothing about tokens."""

from collections.abc import Sequence


class StopFinder:
    """One choice's text on its way out: what might be the beginning of a stop string is held back.

    Of several stop strings the one that is complete first counts, of those the longest; the text ends before it.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        """`stop_strings` are not empty; without any, text passes through."""
        self._stop_strings = stop_strings
        self._beginnings = frozenset(stop[:end] for stop in stop_strings for end in range(1, len(stop)))
        self._longest = max(map(len, self._beginnings), default=0)
        self._held = ""
        self.found = False
        """Whether a stop string has come; then nothing more does."""

    @property
    def active(self) -> bool:
        """Whether there is anything to find."""
        return bool(self._stop_strings)

    def push(self, text: str, *, ends: bool = True) -> str:
        """Takes the next piece and returns the text that is certain.

        Args:
            text: the piece.
            ends: whether a stop string that is complete with this piece counts; one that is not complete yet may
                begin in a piece that did not count.
        """
        if not self._stop_strings or self.found:
            return "" if self.found else text
        seen, num_old = self._held + text, len(self._held)
        if ends and (begin := self._find(seen, num_old)) is not None:
            self.found, self._held = True, ""
            return seen[:begin]
        certain = len(seen) - self._num_held(seen)
        self._held = seen[certain:]
        return seen[:certain]

    def flush(self) -> str:
        """The rest, when no more text comes."""
        rest, self._held = self._held, ""
        return rest

    def _find(self, seen: str, num_old: int) -> int | None:
        """Where the first complete stop string that ends behind the first `num_old` characters begins."""
        ends = []
        for stop in self._stop_strings:
            begin = seen.find(stop, max(0, num_old - len(stop) + 1))
            if begin >= 0:
                ends.append((begin + len(stop), begin))
        return min(ends)[1] if ends else None

    def _num_held(self, seen: str) -> int:
        """Characters at the end that begin a stop string."""
        lengths = range(min(self._longest, len(seen)), 0, -1)
        return next((length for length in lengths if seen[-length:] in self._beginnings), 0)
