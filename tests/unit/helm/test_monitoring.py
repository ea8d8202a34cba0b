"""What the chart says to Prometheus: every process is scraped and placed, and what is asked for exists."""

import json
from collections.abc import Callable

import pytest

from support.chart import Rendered
from support.chart_cases import CASES, rendered_case
from support.chart_monitoring import MONITORING_INVARIANTS
from support.metric_names import known_metrics, names_in
from support.relabelling import relabelled

MONITORED = [name for name, values in CASES.items() if "monitoring" in values or name == "multi-node-rdma"]


@pytest.fixture(scope="module", params=MONITORED)
def rendered(request: pytest.FixtureRequest) -> Rendered:
    return rendered_case(request.param)


@pytest.mark.parametrize("invariant", MONITORING_INVARIANTS, ids=lambda function: function.__name__)
def test_invariant(rendered: Rendered, invariant: Callable[[Rendered], None]) -> None:
    invariant(rendered)


def test_relabelling_as_prometheus_does_it() -> None:
    join = {"sourceLabels": ["a", "b"], "regex": "(x);(.*)", "targetLabel": "c", "replacement": "$2-$1"}
    assert relabelled([join], {"a": "x", "b": "y"}) == {"a": "x", "b": "y", "c": "y-x"}
    assert relabelled([join], {"a": "xx", "b": "y"}) == {"a": "xx", "b": "y"}
    assert relabelled([{"action": "labeldrop", "regex": "a|b"}], {"a": "x", "ab": "y"}) == {"ab": "y"}


def test_the_dashboard_asks_for_what_there_is() -> None:
    page = json.loads(rendered_case("monitoring").named("ConfigMap", "sps2-dashboard")["data"]["sps2.json"])
    graphs = [panel for panel in page["panels"] if panel["type"] != "row"]
    queries = [target["expr"] for panel in graphs for target in panel["targets"]]
    asked = {name for query in queries for name in names_in(query)}
    assert asked <= known_metrics()
    # What is exported is shown: a metric that nobody looks at is one too many, or a graph is missing.
    assert known_metrics() <= asked | {"sps2_directory_revision"}
    assert all('namespace="$namespace"' in query for query in queries)


def test_panels_do_not_overlap() -> None:
    page = json.loads(rendered_case("monitoring").named("ConfigMap", "sps2-dashboard")["data"]["sps2.json"])
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in page["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) == 23
    assert len({panel["id"] for panel in page["panels"]}) == len(page["panels"])
