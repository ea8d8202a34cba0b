"""A deployment under the eyes of a real Prometheus, with the rules and labels that the chart would give it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.chart import CHART_DIR, NAMESPACE, RELEASE, render
from support.chart_cases import MONITORING, pools
from support.chart_monitoring import queries
from support.deployment import LocalDeployment
from support.prometheus import Prometheus, Target, prometheus

SCOPE = f'namespace="{NAMESPACE}", release="{RELEASE}"'
"""Selects the deployment's series."""


@contextmanager
def watching(running: LocalDeployment, folder: Path) -> Iterator[Prometheus]:
    """Starts a server in an empty folder and yields it once every process has been scraped.

    `running` serves metrics; without an installed Prometheus the test is skipped.
    """
    (rule,) = render({"monitoring": MONITORING}).of("PrometheusRule")
    targets = list(_targets(running))
    assert targets, "the deployment was started without --metrics-port-base"
    with prometheus(folder, rule["spec"], targets) as server:
        server.wait_for(f"sum(up{{{SCOPE}}}) == {len(targets)}")
        yield server


def _targets(running: LocalDeployment) -> Iterator[Target]:
    """As the PodMonitor labels them; a process of `sps2 up` stands for a pod."""
    for name, address in running.metrics.items():
        component, _, place = name.partition("-")
        labels = {"namespace": NAMESPACE, "release": RELEASE, "pod": name, "component": component}
        if place:
            labels |= dict(zip(("group", "rank"), name.split("/"), strict=True))
        yield Target(address, labels)


def unhealthy(server: Prometheus) -> list[str]:
    """The rules that did not evaluate, with their errors; of those that were evaluated at all."""
    return [f"{one['name']}: {one.get('lastError')}" for one in server.rules() if one["health"] == "err"]


def dashboard_queries() -> list[str]:
    """Every query of the dashboard, for this deployment."""
    page = json.loads((CHART_DIR / "dashboards" / "sps2.json").read_text(encoding="utf-8"))
    texts = [target["expr"] for panel in page["panels"] for target in panel.get("targets", [])]
    return [
        text.replace("$namespace", NAMESPACE).replace("$release", RELEASE).replace("$__rate_interval", "4m")
        for text in texts
    ]


def scaling_queries() -> list[str]:
    """What the autoscalers' own triggers ask."""
    keda = {"autoscaling": {"kind": "keda"}}
    return queries(render({**pools(**keda), "router": keda}))
