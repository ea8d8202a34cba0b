"""Grafana's dashboard as JSON, from panels.py. Knows Grafana's format and nothing of what is shown."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

WIDTH = 24
"""Columns of Grafana's grid."""
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Panel:
    """One graph."""

    title: str
    unit: str
    """Grafana's name of it: s, Bps, percentunit, short..."""
    queries: Sequence[tuple[str, str]]
    """Expressions, and the legend of what each returns."""
    kind: str = "timeseries"
    """timeseries, or stat: the last value in large."""
    stacked: bool = False
    description: str = ""


@dataclass(frozen=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: Sequence[Panel] = field(default=())
    width: int = 8
    height: int = 7


def dashboard(rows: Sequence[Row]) -> str:
    """The file that Grafana imports."""
    panels = [panel | {"id": number} for number, panel in enumerate(_placed(rows), 1)]
    page = {
        "title": "SPS2",
        "uid": "sps2",
        "schemaVersion": 39,
        "tags": ["sps2"],
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "30s",
        "graphTooltip": 1,
        "templating": {"list": _variables()},
        "panels": panels,
    }
    return json.dumps(page, indent=1, ensure_ascii=False) + "\n"


def _placed(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    top = 0
    for row in rows:
        yield _heading(row.title, top)
        top += 1
        for index, panel in enumerate(row.panels):
            line, column = divmod(index * row.width, WIDTH)
            place = {"x": column, "y": top + line * row.height, "w": row.width, "h": row.height}
            yield _panel(panel) | {"gridPos": place}
        top += -(-len(row.panels) * row.width // WIDTH) * row.height


def _heading(title: str, top: int) -> dict[str, Any]:
    place = {"x": 0, "y": top, "w": WIDTH, "h": 1}
    return {"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": place}


def _panel(panel: Panel) -> dict[str, Any]:
    stacking = {"custom": {"stacking": {"mode": "normal"}, "fillOpacity": 20}} if panel.stacked else {}
    return {
        "type": panel.kind,
        "title": panel.title,
        **({"description": panel.description} if panel.description else {}),
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, **stacking}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + index), "expr": expr, "legendFormat": legend}
            for index, (expr, legend) in enumerate(panel.queries)
        ],
    }


def _variables() -> list[dict[str, Any]]:
    return [
        {"name": "datasource", "type": "datasource", "query": "prometheus"},
        _variable("namespace", "label_values(sps2_build_info, namespace)"),
        _variable("release", 'label_values(sps2_build_info{namespace="$namespace"}, release)'),
    ]


def _variable(name: str, query: str) -> dict[str, Any]:
    return {"name": name, "type": "query", "datasource": DATASOURCE, "query": query, "refresh": 2}
