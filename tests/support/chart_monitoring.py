"""What must hold of monitoring in every rendering, one function each; they raise AssertionError."""

import re
from collections.abc import Callable
from pathlib import Path

from support.chart import RELEASE, Object, Rendered
from support.metric_names import known_metrics, names_in
from support.network_policy import matches
from support.rank_commands import processes
from support.relabelling import discovered, relabelled

OPERATING = Path(__file__).resolve().parents[2] / "docs" / "operating.md"
PLACEHOLDER = re.compile(r"VALUE_|SCOPE|NAMESPACE|RELEASE|FULLNAME|RUNBOOKS|PROMETHEUS")


def every_process_is_scraped_once(rendered: Rendered) -> None:
    for monitor in rendered.of("PodMonitor"):
        endpoints = monitor["spec"]["podMetricsEndpoints"]
        assert len({one["port"] for one in endpoints}) == len(endpoints)
        for workload in rendered.workloads:
            for process in processes(workload):
                assert matches(monitor["spec"]["selector"], workload.labels)
                ports = {one["name"]: one["containerPort"] for one in process.container["ports"]}
                found = [ports[one["port"]] for one in endpoints if one["port"] in ports]
                assert found == process.metrics_ports, (workload.name, process.container["name"])


def series_know_their_place(rendered: Rendered) -> None:
    for monitor in rendered.of("PodMonitor"):
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            for workload in rendered.workloads:
                for process in processes(workload):
                    labels = relabelled(endpoint["relabelings"], discovered(workload, process))
                    kept = {name: value for name, value in labels.items() if not name.startswith("__")}
                    place = {"release": RELEASE, "component": workload.component}
                    if workload.component in {"prefill", "decode"}:
                        place |= {"group": process.config.group, "rank": str(process.config.rank)}
                    assert kept == place
            assert "group" not in relabelled(endpoint["metricRelabelings"], {"exported_group": "g"})


def metrics_are_those_of_the_services(rendered: Rendered) -> None:
    recorded = {rule["record"] for rule in rules(rendered) if "record" in rule}
    for text in [*(rule["expr"] for rule in rules(rendered)), *queries(rendered)]:
        assert names_in(text) <= known_metrics(), text
        assert set(re.findall(r"\bsps2:\w+(?::\w+)*", text)) <= recorded, text


def words_are_filled_in(rendered: Rendered) -> None:
    for one in rendered.of("PrometheusRule", "ScaledObject"):
        assert not PLACEHOLDER.search(str(one["spec"])), one["metadata"]["name"]
        # One Prometheus may watch several releases: each selects its own.
        for text in [*(rule["expr"] for rule in rules(rendered)), *queries(rendered)]:
            selectors = re.findall(r"\b(?:sps2[_:][\w:]+|up|kube_\w+)(\{[^}]*\})?", text)
            assert selectors
            assert all('namespace="serving"' in selector for selector in selectors), text


def alerts_lead_to_the_guide(rendered: Rendered) -> None:
    headings = re.findall(r"^#+ (.*)$", OPERATING.read_text(encoding="utf-8"), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
    alerts = [rule for rule in rules(rendered) if "alert" in rule]
    assert len({rule["alert"] for rule in alerts}) == len(alerts)
    for rule in alerts:
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
        page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert page == rendered.values["monitoring"]["prometheusRule"]["runbooks"]
        assert anchor in anchors, rule["alert"]


def rules(rendered: Rendered) -> list[Object]:
    """All recording and alert rules."""
    return [
        rule
        for one in rendered.of("PrometheusRule")
        for group in one["spec"]["groups"]
        for rule in group["rules"]
    ]


def queries(rendered: Rendered) -> list[str]:
    """What the chart's own triggers ask Prometheus."""
    return [
        trigger["metadata"]["query"]
        for one in rendered.of("ScaledObject")
        for trigger in one["spec"]["triggers"]
        if "name" in trigger
    ]


MONITORING_INVARIANTS: tuple[Callable[[Rendered], None], ...] = (
    every_process_is_scraped_once,
    series_know_their_place,
    metrics_are_those_of_the_services,
    words_are_filled_in,
    alerts_lead_to_the_guide,
)
