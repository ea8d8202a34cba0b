"""Where a generation's prompt and options come from: flags, files, stdin, JSON lines. No network."""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from sps2_client import ChatMessage, GenerationOptions

STDIN = "-"


class PromptError(ValueError):
    """The prompt's source cannot be used; a mistake of the caller."""


@dataclass(frozen=True)
class Prompt:
    """One request: text or token ids, and its options."""

    text: str | None
    """The prompt as text; None when `options` holds token ids."""
    options: GenerationOptions
    """Keyword arguments of `Client.stream`."""


def read_text(source: str) -> str:
    """Text of a file, or of stdin for "-".

    Raises:
        PromptError: it cannot be read, or is no UTF-8.
    """
    try:
        if source == STDIN:
            return sys.stdin.buffer.read().decode()
        return Path(source).read_text(encoding="utf-8")
    except OSError as error:
        raise PromptError(f"cannot read {source}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"{source} is not UTF-8: {error.reason} at byte {error.start}") from error


def as_chat(text: str, system: str | None) -> list[ChatMessage]:
    """A prompt as a user's turn, behind what the system says."""
    before: list[ChatMessage] = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": text}]


def parse_lines(lines: Iterable[str], defaults: GenerationOptions) -> list[Prompt]:
    """One prompt for each line: a JSON string, or an object with `prompt`, `token_ids` or `messages` and any options.

    Raises:
        PromptError: a line is wrong; names its number.
    """
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                prompts.append(_parse_line(line, defaults))
            except ValueError as error:
                raise PromptError(f"line {number}: {error}") from error
    if not prompts:
        raise PromptError("no prompts")
    return prompts


def _parse_line(line: str, defaults: GenerationOptions) -> Prompt:
    record: Any = json.loads(line)
    if isinstance(record, str):
        record = {"prompt": record}
    if not isinstance(record, dict):
        raise PromptError("neither a string nor an object")
    text = record.pop("prompt", None)
    sources = [text, record.get("token_ids"), record.get("messages")]
    unknown = record.keys() - get_type_hints(GenerationOptions).keys()
    if unknown:
        raise PromptError(f"unknown keys {', '.join(sorted(unknown))}")
    if sources.count(None) != 2:
        raise PromptError("give exactly one of prompt, token_ids and messages")
    if text is not None and not isinstance(text, str):
        raise PromptError("prompt is not a string")
    if isinstance(bias := record.get("logit_bias"), dict):
        record["logit_bias"] = {
            int(token_id): value for token_id, value in bias.items()
        }  # JSON has no int keys
    options: GenerationOptions = {**defaults, **record}
    return Prompt(text, options)
