"""Profiles from a JSON file.

    {
      "min_shard_tokens": 128,
      "profiles": [
        {"shards": 4, "levels": [[1, 1], [4, 2]], "query_mode": "sampled", "tail": 64, "sinks": 4}
      ]
    }

`profiles` are the rungs of a ladder, by ascending number of shards: a prompt takes the last one whose shards
have at least `min_shard_tokens` (default 4,096), and is dense where none has. In a rung `shards` and `levels`
([group, stride] each) must be given; `query_mode` is "sampled" (default) or "dense"; `tail` and `sinks` are 0
unless given.
"""

import json
from pathlib import Path
from typing import Any

from sps2_layout.profiles import MIN_SHARD_TOKENS, NAMED, Ladder, Profile

QUERY_MODES = {"sampled": False, "dense": True}


class ProfileError(ValueError):
    """A profile that cannot be used; one line that says where and why."""


def load_profile(name_or_file: str) -> Ladder:
    """The ladder of a name (exact, paper, default) or of a JSON file, which is called by its stem.

    Raises:
        ProfileError: no such name or file, or what is in it cannot be used.
    """
    if name_or_file in NAMED:
        return NAMED[name_or_file]
    path = Path(name_or_file)
    try:
        return parse_profile(path.stem, path.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(NAMED)
        raise ProfileError(
            f"profile {name_or_file!r} is none of {known}, nor a file to read: {error.strerror}"
        ) from None
    except ValueError as error:
        raise ProfileError(f"{path}: {error}") from None


def parse_profile(name: str, text: str) -> Ladder:
    """The ladder of a JSON document.

    Raises:
        ValueError: what is wrong, and in which rung.
    """
    document = _fields(json.loads(text), "the document", {"min_shard_tokens", "profiles"}, {"profiles"})
    rungs = document["profiles"]
    if not isinstance(rungs, list):
        raise ProfileError("profiles must be a list")
    min_shard_tokens = _count(document, "min_shard_tokens", MIN_SHARD_TOKENS)
    return Ladder(
        name, tuple(_rung(rung, f"profiles[{i}]") for i, rung in enumerate(rungs)), min_shard_tokens
    )


def _rung(record: Any, where: str) -> Profile:
    allowed = {"shards", "levels", "query_mode", "tail", "sinks"}
    fields = _fields(record, where, allowed, {"shards", "levels"})
    mode = fields.get("query_mode", "sampled")
    if mode not in QUERY_MODES:
        raise ProfileError(f"{where}: query_mode {mode!r} is none of {', '.join(QUERY_MODES)}")
    try:
        return Profile(
            _count(fields, "shards", 1),
            _levels(fields["levels"]),
            dense_queries=QUERY_MODES[mode],
            sinks=_count(fields, "sinks", 0),
            tail=_count(fields, "tail", 0),
        )
    except ValueError as error:
        raise ProfileError(f"{where}: {error}") from None


def _fields(record: Any, where: str, allowed: set[str], required: set[str]) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ProfileError(f"{where} is not an object")
    if unknown := sorted(record.keys() - allowed):
        raise ProfileError(f"{where}: unknown {', '.join(unknown)}; there are {', '.join(sorted(allowed))}")
    if missing := sorted(required - record.keys()):
        raise ProfileError(f"{where}: {', '.join(missing)} missing")
    return record


def _count(fields: dict[str, Any], name: str, default: int) -> int:
    value = fields.get(name, default)
    if type(value) is not int or value < 0:  # a bool is an int, but no count
        raise ProfileError(f"{name} must be a whole number >= 0, not {value!r}")
    return value


def _levels(value: Any) -> tuple[tuple[int, int], ...]:
    pairs = value if isinstance(value, list) else []
    numbers = all(
        isinstance(pair, list) and len(pair) == 2 and all(type(number) is int for number in pair)
        for pair in pairs
    )
    if not pairs or not numbers:
        raise ProfileError("levels must be a list of [group, stride], as in [[1, 1], [8, 4]]")
    return tuple((group, stride) for group, stride in pairs)
