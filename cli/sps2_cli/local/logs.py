"""What the processes print: shown or filed, the last lines kept, the cause of a failure found in them."""

import collections
import json
import logging
import logging.handlers
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

KEEP_LINES = 60
MAX_LINE_CHARS = 2000
MAX_FILE_BYTES = 16 * 1024 * 1024

Show: TypeAlias = Callable[[str], None]
"""Prints one line for people."""

# What structlog puts into every line and a reader of the terminal has no use for.
_DULL = frozenset({"event", "level", "timestamp", "logger", "service", "exception"})
_TEXT_ERROR: re.Pattern[str] = re.compile(r"\[(error|critical)\s*\]")


class LineLog:
    """The lines of one process, across its restarts; written by one thread at a time."""

    def __init__(self, name: str, show: Show | None, log_dir: Path | None) -> None:
        """Keeps the last lines; also shows each with the name before it, or files it, when so told.

        Raises:
            OSError: the log file cannot be opened.
        """
        self._name = name
        self._show = show
        self._tail: collections.deque[str] = collections.deque(maxlen=KEEP_LINES)
        self._file: logging.handlers.RotatingFileHandler | None = None
        if log_dir is not None:
            path = log_dir / f"{name.replace('/', '-')}.log"
            self._file = logging.handlers.RotatingFileHandler(path, maxBytes=MAX_FILE_BYTES, backupCount=1)

    def add(self, line: str) -> None:
        """Takes one line."""
        line = line.rstrip("\r\n")[:MAX_LINE_CHARS]
        if not line:
            return
        self._tail.append(line)
        if self._file is not None:
            self._file.emit(logging.makeLogRecord({"msg": line}))
        elif self._show is not None:
            self._show(f"{_speaker(line, self._name)} | {readable(line)}")

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    @property
    def tail(self) -> list[str]:
        """The last lines, oldest first."""
        return list(self._tail)


def readable(line: str) -> str:
    """A JSON log line as "level event key=value ..."; any other line as it is."""
    record = _record(line)
    if record is None:
        return line
    facts = " ".join(f"{key}={value}" for key, value in record.items() if key not in _DULL)
    level, event = str(record.get("level", "info")), str(record["event"])
    text = f"{level:<7} {event} {facts}".rstrip()
    return f"{text}\n{record['exception']}" if "exception" in record else text


def _speaker(line: str, process: str) -> str:
    """Who says it: a rank's engine writes where its supervisor does."""
    service = (_record(line) or {}).get("service")
    return service if isinstance(service, str) and service.startswith(f"{process} ") else process


def cause(lines: Sequence[str]) -> str:
    """The line that best says why a process failed; empty when it said nothing.

    The last error that it logged; else the last line that is no log line (its own words on stderr, or the end
    of a traceback); else its last line.
    """
    errors = [text for line in lines if (text := _error_of(line))]
    own_words = [line.strip() for line in lines if _record(line) is None and line.strip()]
    anything = [readable(line) for line in lines]
    best = errors or own_words or anything
    return best[-1] if best else ""


def needs_context(lines: Sequence[str]) -> bool:
    """Whether one line is not enough: the process ended by an exception, or without a word."""
    return not lines or any("Traceback (most recent call last)" in line for line in lines)


def _error_of(line: str) -> str:
    """What a log line of an error says; empty for any other line."""
    record = _record(line)
    if record is None:
        return line.strip() if _TEXT_ERROR.search(line) else ""
    if record.get("level") not in {"error", "critical"}:
        return ""
    facts = [str(value) for key, value in record.items() if key in {"reason", "error", "detail"}]
    exception = str(record.get("exception", "")).strip().splitlines()
    return ": ".join([str(record["event"]), *facts, *exception[-1:]])


def _record(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None  # a line that only looks like JSON is shown as it is
    return record if isinstance(record, dict) and "event" in record else None
