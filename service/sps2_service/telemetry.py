"""Logging set-up: structlog, JSON lines for machines, rich text on a terminal; no prompts, tokens or secrets.

Everything goes to stderr, also what libraries log through `logging`: stdout belongs to what a program prints
for its caller.
"""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

REDACTED = "[redacted]"

# Fields that would carry what a user wrote or what opens a door. A log call that passes one is a mistake, and
# this is the net under it; counts and hashes of the same things have other names (num_tokens, prompt_hash).
FORBIDDEN_FIELDS = frozenset(
    {
        "api_key", "authorization", "cache_salt", "content", "messages", "nonce", "password", "prompt",
        "request", "response", "secret", "spec", "stop", "text", "token", "token_ids", "tokens",
    }
)  # fmt: skip

REQUEST_FIELDS = ("request_id", "attempt")
"""What a line carries where a request is at work."""


def configure_logging(
    service: str, *, level: str = "info", json: bool | None = None, stream: TextIO | None = None
) -> None:
    """Sets up logging for this process; called once, by `main`.

    Args:
        service: Bound to every line as `service`.
        level: debug, info, warning, error or critical.
        json: JSON lines or rich text; None: rich text where `stream` is a terminal.
        stream: stderr unless given.

    Raises:
        ValueError: unknown level.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"unknown log level {level!r}: use debug, info, warning, error or critical")
    stream = stream or sys.stderr
    as_json = not stream.isatty() if json is None else json
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _Bind({"service": service}),
        redact,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        # Modules get their loggers at import, before this runs; caching would pin the defaults of that time.
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            # What is logged through `logging` says whose request it is by `extra`.
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(allow=REQUEST_FIELDS), *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers(as_json)],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(number)


def _renderers(as_json: bool) -> list[Processor]:
    if as_json:
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    # Tracebacks without local variables: those hold prompts.
    traceback = structlog.dev.RichTracebackFormatter(show_locals=False)
    return [structlog.dev.ConsoleRenderer(exception_formatter=traceback)]


class _Bind:
    """Adds fixed fields to every line; unlike a context variable it also reaches other threads."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        self._fields = dict(fields)

    def __call__(self, _: WrappedLogger, __: str, event: EventDict) -> EventDict:
        return {**self._fields, **event}


def redact(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Replaces the values of FORBIDDEN_FIELDS, and bytes and very long texts under any name."""
    for name, value in event.items():
        if name in FORBIDDEN_FIELDS or isinstance(value, (bytes, bytearray)):
            event[name] = REDACTED
        elif isinstance(value, str) and len(value) > 2048:
            event[name] = value[:2048] + "…"
    return event


def bind_request(request_id: str, attempt: int | None = None) -> None:
    """Binds request_id and attempt to every line of this task from now on; called once, in a call's own task."""
    structlog.contextvars.bind_contextvars(**_request_fields(request_id, attempt))


@contextmanager
def bound_request(request_id: str, attempt: int | None = None) -> Iterator[None]:
    """Binds request_id and attempt to every line of this task, and of tasks made within the block."""
    with structlog.contextvars.bound_contextvars(**_request_fields(request_id, attempt)):
        yield


def _request_fields(request_id: str, attempt: int | None) -> dict[str, object]:
    return {"request_id": request_id} | ({} if attempt is None else {"attempt": attempt})
