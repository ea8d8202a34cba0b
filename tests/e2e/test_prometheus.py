"""A real Prometheus reads a live deployment with the chart's rules; at full size: tests/acceptance/kubernetes."""

from pathlib import Path

import pytest

from support.deployment import LocalDeployment
from support.watching import unhealthy, watching

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


def test_a_real_prometheus_reads_it(demo: LocalDeployment, tmp_path: Path) -> None:
    with watching(demo, tmp_path) as server, demo.client() as client:
        client.generate("It was a dark night", max_tokens=8)
        (slow,) = server.wait_for("sps2:time_to_first_token_seconds:p95_5m > 0")
        assert slow.labels["release"] == "sps2"
        assert unhealthy(server) == []
