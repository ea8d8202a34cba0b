"""What the chart says to Prometheus: every process is scraped and placed, and what is asked for exists."""

from collections.abc import Callable

import pytest

from support.chart import Rendered
from support.chart_cases import CASES, rendered_case
from support.chart_monitoring import MONITORING_INVARIANTS
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
