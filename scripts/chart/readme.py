"""The chart's README, from the comments in values.yaml: those directly above a key describe it.

Knows nothing about what the values do.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import yaml


@dataclass(frozen=True)
class Value:
    """One row of the table."""

    path: str
    """`router.service.port`."""
    default: str
    """As JSON."""
    description: str


def values_of(text: str) -> list[Value]:
    """All values, in order. A mapping whose keys have comments is taken apart, any other is one value.

    Raises:
        ValueError: a value has no comment.
    """
    root = yaml.compose(text)
    assert isinstance(root, yaml.MappingNode)
    return list(_walk(root, "", text.splitlines()))


def _walk(node: yaml.MappingNode, prefix: str, lines: list[str]) -> Iterator[Value]:
    for key, value in node.value:
        path = f"{prefix}{key.value}"
        above = _comment_above(lines, key.start_mark.line)
        inside = isinstance(value, yaml.MappingNode) and value.flow_style is False and bool(value.value)
        if inside and _has_comments(lines, value):
            yield from _walk(value, f"{path}.", lines)
        elif above:
            default = json.dumps(yaml.safe_load(yaml.serialize(value)))
            yield Value(path, default, above)
        else:
            raise ValueError(f"values.yaml: {path} has no comment")


def _comment_above(lines: list[str], line: int) -> str:
    found: list[str] = []
    while line > 0 and lines[line - 1].lstrip().startswith("#"):
        line -= 1
        found.append(lines[line].lstrip().removeprefix("#").strip())
    return " ".join(reversed(found))


def _has_comments(lines: list[str], node: yaml.MappingNode) -> bool:
    inside = lines[node.start_mark.line : node.end_mark.line]
    indent = node.start_mark.column
    return any(line.startswith(" " * indent + "#") for line in [lines[node.start_mark.line - 1], *inside])


def readme(head: str, values_yaml: str) -> str:
    """The whole page: `head`, then a table of the values."""
    rows = [
        f"| `{one.path}` | `{one.default}` | {_cell(one.description)} |" for one in values_of(values_yaml)
    ]
    table = ["| value | default | |", "|---|---|---|", *rows]
    return "\n".join([head.rstrip(), "", "## Values", *table, ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
