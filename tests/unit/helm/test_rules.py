"""Recording and alert rules as the chart renders them, by `promtool test rules`; the cases stand in rules/."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from support.chart import render
from support.chart_cases import MONITORING
from support.chart_monitoring import rules

CASES = sorted((Path(__file__).parent / "rules").glob("*.yaml"))


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where rules.yaml and the cases lie side by side."""
    folder = tmp_path_factory.mktemp("rules")
    (rule,) = render({"monitoring": MONITORING}).of("PrometheusRule")
    (folder / "rules.yaml").write_text(yaml.safe_dump(rule["spec"]), encoding="utf-8")
    for case in CASES:
        shutil.copy(case, folder)
    return folder


def test_prometheus_takes_them(promtool: str, folder: Path) -> None:
    run([promtool, "check", "rules", "--lint=all", "--lint-fatal", "rules.yaml"], folder)


@pytest.mark.parametrize("case", [case.name for case in CASES])
def test_they_say_what_they_should(promtool: str, folder: Path, case: str) -> None:
    run([promtool, "test", "rules", case], folder)


def test_every_alert_has_a_case() -> None:
    cases = "".join(case.read_text(encoding="utf-8") for case in CASES)
    tried = re.findall(r'alertname(?:="|: )(\w+)', cases)
    alerts = {rule["alert"] for rule in rules(render({"monitoring": MONITORING})) if "alert" in rule}
    assert {name for name in alerts if name not in tried} == set()


def run(command: list[str], folder: Path) -> None:
    """Runs promtool; what it prints is the message of a failure."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
