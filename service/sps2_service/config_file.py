"""The configuration file: a JSON object with fields for keys, so that what `--print-config` prints is one.

Knows nothing about flags and environment, which go before it; `config` does.
"""

import json
from pathlib import Path
from typing import Any

from sps2_service.config_fields import Field

MASK = "***"
"""Stands for a secret in what is printed."""


def read_config_file(path: Path, fields: list[Field]) -> dict[str, str]:
    """The texts of a file by the fields' names, as a flag or a variable would give them.

    Raises:
        ValueError: it cannot be read, is no JSON object, has a key twice or one that is no field, or a value that
            no text stands for; one line that names the file and the key.
    """
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_unique)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")  # noqa: TRY004 - the file is wrong, not a caller
    known = {field.name: field for field in fields}
    if unknown := [key for key in content if key not in known]:
        raise ValueError(f"{path}: {unknown[0]}: there is no such setting")
    return {key: _text(value, known[key], f"{path}: {key}") for key, value in content.items()}


def masked(text: str) -> bool:
    """Whether a text is what was printed in place of a secret, or of a URL with a password."""
    return text == MASK or f":{MASK}@" in text or f"={MASK}" in text


def _text(value: Any, field: Field, source: str) -> str:
    if value is None and field.optional:
        return ""
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return ",".join(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return str(value)
    raise ValueError(f"{source}: must be a text, a number, true or false, or a list of texts")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)}: given twice")
    return found
