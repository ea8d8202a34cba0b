"""A file of lines that is read again whenever it has changed; what is wrong in it changes nothing.

`#` begins a comment. Knows nothing of what the lines mean.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import structlog

T = TypeVar("T")

log = structlog.get_logger(__name__)


class LinesError(ValueError):
    """The file cannot be read, or a line of it is wrong; names the line, never what is in it."""


def parse_lines(text: str, entry: Callable[[Sequence[str]], T]) -> tuple[T, ...]:
    """What each line says that is not empty.

    Args:
        text: The lines.
        entry: Takes the words of one; its ValueError says what is wrong, and shows nothing that may be secret.

    Raises:
        LinesError: a line is wrong.
    """
    entries = []
    for number, line in enumerate(text.splitlines(), start=1):
        if words := line.partition("#")[0].split():
            try:
                entries.append(entry(words))
            except ValueError as error:
                raise LinesError(f"line {number}: {error}") from None
    return tuple(entries)


class FollowedFile(Generic[T]):
    """What a file says now."""

    def __init__(self, path: Path, parse: Callable[[str], T]) -> None:
        """`parse` raises LinesError, as this does."""
        self._path = path
        self._parse = parse
        self._seen = self._stamp()
        self._value = self._read()

    def value(self) -> T:
        """What it says; what it said before when it cannot be read or is wrong, which is logged once."""
        if (stamp := self._stamp()) != self._seen:
            self._seen = stamp
            try:
                self._value = self._read()
            except LinesError as error:
                log.error("what was read before stays", reason=str(error))  # noqa: TRY400 - the reason says it
            else:
                log.info("read again", path=str(self._path))
        return self._value

    def _stamp(self) -> tuple[int, int, int] | None:
        """Tells one version of it from another; None while there is none."""
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _read(self) -> T:
        try:
            return self._parse(self._path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise LinesError(f"{self._path}: cannot be read: {type(error).__name__}") from None
        except LinesError as error:
            raise LinesError(f"{self._path}: {error}") from None
