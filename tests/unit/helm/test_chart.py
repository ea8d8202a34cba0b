"""The chart over a matrix of values: every invariant holds, whatever is chosen; what makes no sense is refused."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helm_python
import pytest

from support.chart import CHART_DIR, Rendered, chart, example, render
from support.chart_cases import CASES, HPA, MONITORING, PVC, pools, rendered_case
from support.chart_invariants import INVARIANTS
from support.kube_schemas import NEWEST, errors

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"routr": {}}, "routr"),
    ({"router": {"replica": 3}}, "replica"),
    ({"router": {"replicas": 0}}, "/router/replicas"),
    ({"router": {"flags": {"max-queued": 3}}}, "max-queued"),
    ({"router": {"flags": {"max-queued-tokens": 0}}}, "/router/flags/max-queued-tokens"),
    ({"router": {"flags": {"directory": "elsewhere:1"}}}, "'directory' not allowed"),
    ({"prefill": {"flags": {"exchange": "tokens"}}}, "/prefill/flags/exchange"),
    ({"decode": {"flags": {"exchange": "kv"}}}, "'exchange' not allowed"),
    ({"decode": {"ranks": 0}}, "/decode/ranks"),
    ({"decode": {"placement": "daemonset"}}, "/decode/placement"),
    ({"prefill": {"env": {"HF_TOKEN": "hf_x"}}}, "HF_TOKEN"),
    ({"prefill": {"env": {"SPS2_RANK": "0"}}}, "SPS2_RANK"),
    ({"prefill": {"resources": {"limits": {"memory": "lots"}}}}, "/prefill/resources/limits/memory"),
    ({"redis": {"url": "redis://:hunter2@redis:6379"}}, "/redis/url"),
    ({"images": {"control": {"repository": "r", "tag": "latest"}}}, "/images/control/tag"),
    ({"tracing": {"otlpEndpoint": "collector:4317"}}, "/tracing/otlpEndpoint"),
    ({"tracing": {"sampleRatio": 1.5}}, "/tracing/sampleRatio"),
    ({"attention": {"profile": "sparse"}}, "/attention/profile"),
    ({"model": {"source": "pvc"}}, "model.pvc.claim"),
    ({"model": {"source": "pvc", "pvc": {"claim": "models"}}}, "model.name"),
    ({"model": {"source": "download"}}, "model.download.repo"),
    ({"model": {"hash": "0A"}}, "/model/hash"),
    ({"model": {**PVC, "pvc": {"claim": "models", "path": "../etc"}}}, "/model/pvc/path"),
    ({"attention": {"profile": "exact", "file": "{}"}}, "attention.profile"),
    ({"router": {"ingress": {"enabled": True}}}, "router.ingress.host"),
    ({"router": {"ingress": {"enabled": True, "host": "h"}}}, "router.ingress.tlsSecret"),
    ({"router": {"grpcRoute": {"enabled": True}}}, "router.grpcRoute.parentRefs"),
    ({"router": {"autoscaling": {"kind": "hpa", "min": 9, "max": 3}}}, "router.autoscaling.min"),
    ({"router": {"autoscaling": {"kind": "keda", "signals": {"requests": 0}}}}, "router.autoscaling.signals"),
    ({"decode": {"autoscaling": {"signals": {"queuedTokens": 1}}}}, "queuedTokens"),
    ({"decode": {"autoscaling": {"targetGPU": 1}}}, "targetGPU"),
    ({"decode": {"autoscaling": {"signals": {"kvUsage": 80}}}}, "/decode/autoscaling/signals/kvUsage"),
    ({"router": {"flags": {"metrics-port": ":9"}}}, "'metrics-port' not allowed"),
    ({"router": {"flags": {"tenants": "/x"}}}, "'tenants' not allowed"),
    ({"router": {"authTokens": {"testToken": {"name": "t"}}}}, "router.authTokens.testToken"),
    ({"router": {"authTokens": {"secret": {"name": "t", "key": "../k"}}}}, "/router/authTokens/secret/key"),
    ({"networkPolicy": {"scrapers": []}}, "/networkPolicy/scrapers"),
    ({"metrics": {"enabled": False}, "monitoring": MONITORING}, "monitoring.podMonitor.enabled"),
    ({"monitoring": {"prometheus": "prometheus:9090"}}, "/monitoring/prometheus"),
    ({"monitoring": {"thresholds": {"kvUsage": 95}}}, "/monitoring/thresholds/kvUsage"),
    ({"monitoring": {"thresholds": {"latency": 1}}}, "latency"),
    ({"monitoring": {"slo": {"ttftSeconds": 11}}}, "/monitoring/slo/ttftSeconds"),
    ({"monitoring": {"slo": {"ttftObjective": 1}}}, "/monitoring/slo/ttftObjective"),
    (pools(placement="statefulset", autoscaling=HPA), "prefill.autoscaling.kind"),
    ({"decode": {"exclusiveTopologyKey": "rack"}}, "decode.exclusiveTopologyKey"),
    ({"prefill": {"ranks": 32}}, "prefill.ranks=32"),
    ({"prefill": {"ranks": 3, "flags": {"tp": 2}}}, "prefill.flags.tp=2"),
    ({"decode": {"ranks": 3, "flags": {"tp": 2}}}, "decode.flags.tp=2"),
    ({"gateway": {"enabled": True}}, "gateway"),
]


@pytest.fixture(scope="module", params=CASES)
def rendered(request: pytest.FixtureRequest) -> Rendered:
    return rendered_case(request.param)


@pytest.mark.parametrize("invariant", INVARIANTS, ids=lambda function: function.__name__)
def test_invariant(rendered: Rendered, invariant: Callable[[Rendered], None]) -> None:
    invariant(rendered)


@pytest.mark.parametrize(("values", "named"), REFUSED, ids=[named for _, named in REFUSED])
def test_a_wrong_value_is_refused_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(helm_python.HelmError) as caught:
        render(values)
    assert named in str(caught.value)


@pytest.mark.parametrize("name", ["", "trial-cpu", "one-node-8-gpu", "multi-node-rdma"])
def test_lint_is_strict_and_silent(name: str) -> None:
    values = dict(example(name)) if name else None
    report = helm_python.lint(str(CHART_DIR), values, strict=True, namespace="serving")
    # 1 is "info": that an icon is recommended.
    assert [one for one in report["messages"] if one["severity"] > 1] == []
    assert report["errors"] == []


def test_schemas_notice_a_misspelt_field() -> None:
    lws = render(pools(ranks=2, placement="lws")).of("LeaderWorkerSet")[0]
    assert errors(lws, NEWEST) == []
    lws["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"]["containers"][0]["prots"] = []
    lws["spec"]["replica"] = 2
    assert len(errors(lws, NEWEST)) == 2
    deployment = render().of("Deployment")[0]
    deployment["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]["grpc"]["port"] = "grpc"
    assert len(errors(deployment, NEWEST)) == 1


def test_schemas_of_custom_resources_notice_what_is_wrong() -> None:
    rendered = render(dict(CASES["keda by signals"]) | {"monitoring": MONITORING})
    scaled = rendered.of("ScaledObject")[0]
    scaled["spec"]["triggers"][0] |= {"name": 1, "treshold": "8"}
    scaled["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDwon"] = {}
    assert len(errors(scaled, NEWEST)) == 3
    (rule,) = rendered.of("PrometheusRule")
    rule["spec"]["groups"][0]["rules"][0] |= {"expr": None, "for": "soon"}
    assert len(errors(rule, NEWEST)) == 2
    (monitor,) = rendered.of("PodMonitor")
    monitor["spec"]["podMetricsEndpoints"][0]["relabelings"][0]["action"] = "rename"
    assert len(errors(monitor, NEWEST)) == 1


@pytest.mark.parametrize(
    ("values", "told", "not_told"),
    [
        (
            {},
            ["sps2-router.serving.svc:50051", "without TLS", "Redis is the chart's own"],
            ["SPS2_TLS", "TOKEN"],
        ),
        (
            {
                "tls": {"secret": "certs"},
                "redis": {"url": "redis://r:6379"},
                "router": {"service": {"port": 443}},
            },
            [
                "with TLS",
                "SPS2_TLS_CA=ca.crt",
                "in the Secret certs",
                "50051:443",
                "SPS2_TLS_SERVER_NAME=sps2",
            ],
            ["Redis"],
        ),
        (
            {"router": {"authTokens": {"secret": {"name": "tokens"}}}},
            ["SPS2_TOKEN=", "in the Secret tokens", "set router.authTokens.testToken"],
            ["SPS2_TLS"],
        ),
    ],
    ids=["defaults", "tls", "tokens"],
)
def test_notes_tell_how_to_call_it(values: dict[str, Any], told: list[str], not_told: list[str]) -> None:
    text = chart().render(values, name="sps2", namespace="serving")["sps2/templates/NOTES.txt"]
    assert [one for one in told if one not in text] == []
    assert [one for one in not_told if one in text] == []


def test_generated_files_are_current(repo_root: Path) -> None:
    command = [sys.executable, "-m", "scripts.generate_chart", "--check"]
    check = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False, cwd=repo_root)
    assert check.returncode == 0, check.stderr


def test_chart_and_distribution_have_one_version(repo_root: Path) -> None:
    line = f'version = "{helm_python.Chart.load(CHART_DIR).metadata["appVersion"]}"'
    assert line in (repo_root / "pyproject.toml").read_text(encoding="utf-8")
