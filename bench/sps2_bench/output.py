"""What a command prints and writes: a JSON document or a table, and the folder of plots."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer
from rich.console import Console
from rich.table import Table

Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Plots: TypeAlias = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Write PNG plots into this folder.", file_okay=False)
]

WIDE = 200
"""Columns of a table that no terminal shows."""


def print_json(document: dict[str, Any]) -> None:
    """One document on stdout; not-a-number becomes null, which JSON knows."""
    sys.stdout.write(json.dumps(_finite(document)) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for people, as wide as its terminal; into a file, as wide as it likes."""
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console.width = WIDE
    console.print(table)


def say(text: str) -> None:
    """A line on stderr, beside whatever stdout is used for."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
