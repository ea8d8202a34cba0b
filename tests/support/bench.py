"""Runs `sps2 bench` and `sps2 eval` for the acceptance suites and reads their documents."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def sps2_json(*arguments: str | Path, timeout_s: float) -> dict[str, Any]:
    """The document of a command; what it says on the way goes to stderr as it comes."""
    command = [sys.executable, "-P", "-m", "sps2_cli", *map(str, arguments), "--json"]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=timeout_s, check=True)
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def find(rows: list[Row], **wanted: object) -> Row:
    """The only row with these fields."""
    (row,) = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return row
