"""Typed reading of a checkpoint's JSON files; every fault becomes one line that names file and key."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sps2_engine.weights import CheckpointError


@dataclass(frozen=True)
class Fields:
    """The keys of one JSON object. A key that is absent and one that is null both count as not given."""

    origin: str
    """The file, and the place in it, for messages."""
    values: Mapping[str, Any]
    """The object as read, over the defaults of its family."""

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        return str(self._typed(key, default, str, "a string"))

    def flag(self, key: str, *, default: bool) -> bool:
        """A boolean."""
        return bool(self._typed(key, default, bool, "true or false"))

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number."""
        return int(self._typed(key, default, int, "a whole number"))

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = float(self._typed(key, default, (int, float), "a number"))
        if not 0 < value < math.inf:
            raise self.error(f"{key!r} must be a finite number above zero, not {value}")
        return value

    def optional_whole(self, key: str) -> int | None:
        """A whole number, or None when not given."""
        return None if self.values.get(key) is None else self.whole(key)

    def optional_positive(self, key: str) -> float | None:
        """A finite number above zero, or None when it is zero or not given."""
        return self.positive(key) if self.values.get(key) else None

    def ids(self, key: str) -> tuple[int, ...]:
        """Token ids: one, several or none."""
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
            raise self.error(f"{key!r} must be a token id or a list of them, not {value!r}")
        return tuple(ids)

    def error(self, message: str) -> CheckpointError:
        """An error that names this object, to be raised by the caller."""
        return CheckpointError(f"{self.origin}: {message}")

    def _typed(self, key: str, default: Any, kind: type | tuple[type, ...], wanted: str) -> Any:
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise self.error(f"key {key!r} is missing; it must be {wanted}")
        # bool is an int in Python, and never meant here.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(f"{key!r} must be {wanted}, not {value!r}")
        return value


def read_object(path: Path) -> Mapping[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: if the file is absent, unreadable, not JSON, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent}: no {path.name}; give the folder of a Hugging Face checkpoint"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no JSON object; download it again")
    return value
