"""Must show 3: a real Prometheus scrapes a live deployment by the chart's rules, which say what happens to it."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from sps2_client import Client
from support.deployment import LocalDeployment, deployment, engine_pid
from support.must_show import MustShow
from support.ports import free_port_range
from support.prometheus import Prometheus
from support.watching import SCOPE, dashboard_queries, scaling_queries, unhealthy, watching

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(900)]

NUM_PROCESSES = 6
"""Directory, router, two ranks in each pool."""
NUM_REQUESTS = 12
PROMPT = "It was a dark night, and the rain fell in torrents. " * 200
NOT_WITHOUT = {
    "a GPU": "sps2_device_",
    "Kubernetes": "kube_",
    "an error": "sps2_directory_rpc_errors_total",
}
"""What a query of the dashboard may find nothing of, on a machine where nothing fails."""


@dataclass(frozen=True)
class Watched:
    """A deployment and the server that scrapes it."""

    running: LocalDeployment
    server: Prometheus


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    arguments = ["--threads", "1", "--quiet", "--metrics-port-base", str(free_port_range(NUM_PROCESSES))]
    folder = tmp_path_factory.mktemp("prometheus")
    with deployment(arguments=arguments) as running, watching(running, folder) as server:
        yield Watched(running, server)


def _load(running: LocalDeployment) -> None:
    """More long prompts at once than there are places for, two of them twice."""
    with Client(running.address) as client, ThreadPoolExecutor(NUM_REQUESTS) as pool:
        prompts = [f"{number % (NUM_REQUESTS - 2)}: {PROMPT}" for number in range(NUM_REQUESTS)]
        answers = [pool.submit(client.generate, prompt, max_tokens=48, timeout=600) for prompt in prompts]
        for answer in answers:
            answer.result()


def test_a_scrape_under_load(watched: Watched, must_show: MustShow) -> None:
    with must_show("3 Prometheus: scrapes a live deployment under load") as figures:
        server = watched.server
        figures.append(f"{server.query(f'sum(up{{{SCOPE}}})')[0].value:g} processes are up")
        _load(watched.running)
        for name, expr in {
            "TTFT p95": "sps2:time_to_first_token_seconds:p95_5m > 0",
            "ITL p95": "sps2:inter_token_latency_seconds:p95_5m > 0",
            "most tokens queued": f"max_over_time(sps2_waiting_tokens{{{SCOPE}}}[5m]) > 0",
            "most KV used (decode)": (
                f'max(max_over_time(sps2_kv_cache_usage_ratio{{{SCOPE}, component="decode"}}[5m])) > 0'
            ),
            "exposed communication, s": f"sum(sps2_exposed_communication_seconds_total{{{SCOPE}}}) > 0",
            "requests/s": "sps2:requests:rate5m > 0",
        }.items():
            figures.append(f"{name} {server.wait_for(expr)[0].value:.3g}")


def test_rules_evaluate(watched: Watched, must_show: MustShow) -> None:
    with must_show("3 Prometheus: recording and alert rules evaluate") as figures:
        server = watched.server
        records = [rule["name"] for rule in server.rules() if rule["type"] == "recording"]
        for name in records:
            server.wait_for(name)
        assert unhealthy(server) == []
        # Whether so many prompts at once are answered in time is up to the machine.
        late = "SPS2TimeToFirstToken.*|SPS2InterTokenLatency.*"
        assert server.query(f'ALERTS{{alertstate="firing", alertname!~"{late}"}}') == []
        slowest = max(rule["evaluationTime"] for rule in server.rules())
        figures.append(
            f"{len(server.rules())} rules without an error, {len(records)} recorded, no alert fires but for lateness"
        )
        figures.append(f"the slowest takes {1000 * slowest:.1f} ms")


def test_the_dashboard_and_the_triggers_find_something(watched: Watched, must_show: MustShow) -> None:
    with must_show("3 Prometheus: queries of dashboard and autoscalers answer") as figures:
        graphs, triggers = dashboard_queries(), scaling_queries()
        empty = [text for text in graphs if not watched.server.query(text)]
        assert [text for text in empty if not any(name in text for name in NOT_WITHOUT.values())] == []
        for text in triggers:
            (sample,) = watched.server.query(text)
            assert sample.value >= 0, text
        figures.append(
            f"{len(graphs)} queries, {len(empty)} of them empty for want of {', '.join(NOT_WITHOUT)}"
        )
        figures.append(f"{len(triggers)} triggers, one number each")


def test_alerts_tell_what_happened(watched: Watched, must_show: MustShow) -> None:
    with must_show("3 Prometheus: an engine that is killed, a directory that stands still") as figures:
        server = watched.server
        os.kill(engine_pid(watched.running.pids["decode-0/1"]), signal.SIGKILL)
        (alert,) = server.wait_for('ALERTS{alertname="SPS2EngineRestarts", alertstate="firing"}')
        assert (alert.labels["group"], alert.labels["rank"]) == ("decode-0", "1")
        figures.append("SPS2EngineRestarts fires for decode-0/1")
        names = "SPS2DirectoryDown|SPS2TargetDown|SPS2DirectoryDegraded"
        directory = watched.running.pids["directory"]
        os.kill(directory, signal.SIGSTOP)
        try:
            server.wait_for(f'count(count by (alertname) (ALERTS{{alertname=~"{names}"}})) == 3')
        finally:
            os.kill(directory, signal.SIGCONT)
        server.wait_for(f'(count(ALERTS{{alertname=~"{names}"}}) or vector(0)) == 0')
        figures.append(f"{names.replace('|', ', ')} are pending, and go again")
