"""The fields of a configuration dataclass: their types taken apart, their texts parsed, their help found.

Knows nothing about flags and where a text comes from; `config` does.
"""

import ast
import dataclasses
import functools
import inspect
import math
import textwrap
import types
import typing
from typing import Any

ENV_PREFIX = "SPS2_"
TRUE = frozenset({"true", "1", "yes", "on"})
FALSE = frozenset({"false", "0", "no", "off"})


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What `config.setting` notes in a field's metadata."""

    minimum: float | None = None
    maximum: float | None = None
    secret: bool = False


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a configuration."""

    name: str
    kind: Any
    """The type without `| None`."""
    optional: bool
    """Whether the type has `| None`."""
    default: Any
    """dataclasses.MISSING for a required field."""
    help: str
    """The field's docstring, on one line."""
    bounds: Bounds

    @property
    def required(self) -> bool:
        """Whether the field has no default."""
        return self.default is dataclasses.MISSING

    @property
    def flag(self) -> str:
        """`--max-queued-tokens`."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """`SPS2_MAX_QUEUED_TOKENS`."""
        return ENV_PREFIX + self.name.upper()

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a Literal, else nothing."""
        return typing.get_args(self.kind) if typing.get_origin(self.kind) is typing.Literal else ()

    def parse(self, text: str, source: str) -> Any:
        """The value of a text; the ValueError of a wrong one names `source` and what is allowed."""
        if text == "" and self.optional:
            return None
        try:
            value = self._convert(text)
            self._check_bounds(value)
        except ValueError as error:
            given = "" if self.bounds.secret else f" {text!r}"
            raise ValueError(f"{source}{given}: {error}") from None
        return value

    def _convert(self, text: str) -> Any:
        if self.choices:
            if text not in self.choices:
                raise ValueError(f"must be one of {', '.join(self.choices)}")
            return text
        if typing.get_origin(self.kind) is tuple:
            return tuple(part.strip() for part in text.split(",") if part.strip())
        if self.kind is bool:
            return _boolean(text)
        try:
            return self.kind(text)
        except ValueError:
            raise ValueError(f"must be {'a whole number' if self.kind is int else 'a number'}") from None

    def _check_bounds(self, value: Any) -> None:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("must be a finite number")
        if self.bounds.minimum is not None and value < self.bounds.minimum:
            raise ValueError(f"must be at least {self.bounds.minimum:g}")
        if self.bounds.maximum is not None and value > self.bounds.maximum:
            raise ValueError(f"must be at most {self.bounds.maximum:g}")


def _boolean(text: str) -> bool:
    lowered = text.strip().lower()
    if lowered not in TRUE | FALSE:
        raise ValueError("must be true or false")
    return lowered in TRUE


def fields_of(cls: type[Any]) -> list[Field]:
    """The fields of a dataclass, in order, those of its bases first."""
    hints = typing.get_type_hints(cls)
    docs = _field_docs(cls)  # type: ignore[arg-type] # a class is hashable, whatever mypy makes of type[Any]
    result = []
    for field in dataclasses.fields(cls):
        kind, optional = hints[field.name], False
        if isinstance(kind, types.UnionType):
            (kind,) = (one for one in typing.get_args(kind) if one is not types.NoneType)
            optional = True
        bounds = field.metadata.get("bounds", Bounds())
        result.append(Field(field.name, kind, optional, field.default, docs.get(field.name, ""), bounds))
    return result


@functools.cache
def _field_docs(cls: type[Any]) -> dict[str, str]:
    """The text under each field. Python keeps none at run time, so the source is read (once, at start)."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            source = inspect.getsource(base)
        except OSError:
            continue  # installed without sources, or typed at a prompt: flags work, their help is empty
        (definition,) = ast.parse(textwrap.dedent(source)).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                docs[field.target.id] = _text(text)
    return docs


def _text(node: ast.stmt) -> str:
    if (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ):
        return " ".join(node.value.value.split())
    return ""
