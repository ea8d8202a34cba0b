"""Exit codes, and what each error says on the way out."""

import enum
import json
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import grpc
import typer

from sps2_client import ConnectionFailed, SPS2Error, StatusError

# The service took the request and could not do it; that is a failure, not a refusal.
_FAILURES = frozenset(
    {
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DATA_LOSS,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
    }
)


class ExitCode(enum.IntEnum):
    """What the caller of `sps2` can tell apart."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    REFUSED = 3
    CANNOT_CONNECT = 4
    INTERRUPTED = 130


def exit_code(error: SPS2Error) -> ExitCode:
    """Refused only when nothing had come yet: what breaks in mid-answer has failed."""
    if isinstance(error, ConnectionFailed):
        return ExitCode.CANNOT_CONNECT
    if isinstance(error, StatusError) and error.code not in _FAILURES and not error.received.token_ids:
        return ExitCode.REFUSED
    return ExitCode.FAILED


def error_document(error: SPS2Error) -> dict[str, Any]:
    """The error as a JSON document, with what had come before it."""
    return {
        "error": {
            "kind": type(error).__name__,
            "code": error.code.name if error.code else None,
            "reason": error.reason,
            "message": error.message,
            "metadata": error.metadata,
            "field_violations": [
                {"field": v.field, "description": v.description} for v in error.field_violations
            ],
            "retry_after_s": error.retry_after,
        },
        "request_id": error.request_id,
        "text": error.received.text,
        "token_ids": list(error.received.token_ids),
    }


def error_lines(error: SPS2Error) -> list[str]:
    """The error for people."""
    heads = {ExitCode.REFUSED: "refused", ExitCode.CANNOT_CONNECT: "cannot connect"}
    lines = [f"sps2: {heads.get(exit_code(error), 'failed')}: {error}"]
    # A single violation is usually the message itself.
    lines += [
        f"  {one.field}: {one.description}"
        for one in error.field_violations
        if one.description not in error.message
    ]
    lines += [f"  {name}: {value}" for name, value in sorted(error.metadata.items())]
    if error.retry_after is not None:
        lines.append(f"  try again in {error.retry_after:g} s")
    return lines


@contextmanager
def reporting(*, as_json: bool = False) -> Generator[None]:
    """Turns an error of the SDK into its lines on stderr, its document on stdout, and the exit code."""
    try:
        yield
    except SPS2Error as error:
        if as_json:
            sys.stdout.write(json.dumps(error_document(error)) + "\n")
        sys.stderr.write("\n".join(error_lines(error)) + "\n")
        raise typer.Exit(exit_code(error)) from error
