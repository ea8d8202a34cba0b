"""The names of the services' metrics, and which of them a PromQL expression asks for."""

import functools
import re
from pathlib import Path

METRICS_PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
_ROW = re.compile(r"^\| `(sps2_\w+)` \|", re.MULTILINE)
_NAME = re.compile(r"\bsps2_[a-z0-9_]*[a-z0-9]\b")
_OF_A_HISTOGRAM = re.compile(r"_(bucket|count|sum)$")


@functools.cache
def known_metrics() -> frozenset[str]:
    """Names of all families that docs/metrics.md lists, counters with their _total."""
    return frozenset(_ROW.findall(METRICS_PAGE.read_text(encoding="utf-8")))


def names_in(expression: str) -> set[str]:
    """Names of the families that a PromQL expression reads."""
    without_texts = re.sub(r'"[^"]*"', '""', expression)
    return {_OF_A_HISTOGRAM.sub("", name) for name in _NAME.findall(without_texts)}
