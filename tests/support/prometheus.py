"""A real Prometheus server that scrapes given processes by given rules; knows nothing of SPS2."""

import json
import shutil
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.ports import free_port
from support.process import ManagedProcess
from support.waiting import wait_until

INTERVAL = "1s"
"""Between scrapes, and between evaluations of the rules."""
READY_S = 60.0


@dataclass(frozen=True)
class Target:
    """A process to be scraped."""

    address: str
    """HOST:PORT of its metrics."""
    labels: Mapping[str, str]
    """What its series get beside their own labels."""


@dataclass(frozen=True)
class Sample:
    """One series of an answer."""

    labels: dict[str, str]
    value: float


class Prometheus:
    """A server that runs."""

    def __init__(self, address: str) -> None:
        self._address = address

    def query(self, expr: str) -> list[Sample]:
        """What a PromQL expression is now; a scalar is a sample without labels.

        Raises:
            urllib.error.HTTPError: the expression is wrong.
        """
        data = self._get("query", query=expr)
        if data["resultType"] == "scalar":
            return [Sample({}, float(data["result"][1]))]
        return [Sample(one["metric"], float(one["value"][1])) for one in data["result"]]

    def rules(self) -> list[dict[str, Any]]:
        """All rules, with their health and last error; alerts with their state."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def wait_for(self, expr: str, timeout: float = 60.0) -> list[Sample]:
        """The samples of an expression, as soon as there are any.

        Raises:
            TimeoutError: none came within `timeout` seconds.
        """
        try:
            wait_until(lambda: bool(self.query(expr)), timeout, interval=0.2)
        except TimeoutError:
            raise TimeoutError(f"nothing in {timeout:g} s: {expr}") from None
        return self.query(expr)

    def _get(self, path: str, **parameters: str) -> Any:
        url = f"http://{self._address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=20) as response:
            return json.load(response)["data"]


@contextmanager
def prometheus(folder: Path, rules: object, targets: Sequence[Target]) -> Iterator[Prometheus]:
    """Starts a server, yields it when it is ready, and ends it whatever happens; skips where none is installed.

    Args:
        folder: An empty one, for its configuration and data.
        rules: The content of a file of rules.
        targets: Whom to scrape.
    """
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed")
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules), encoding="utf-8")
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(_configuration(targets)), encoding="utf-8")
    address = f"127.0.0.1:{free_port()}"
    command = [
        program,
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]
    with ManagedProcess(command, name="prometheus") as process:
        process.wait_for_line("Server is ready to receive web requests", READY_S)
        yield Prometheus(address)


def _configuration(targets: Sequence[Target]) -> dict[str, Any]:
    return {
        "global": {"scrape_interval": INTERVAL, "scrape_timeout": INTERVAL, "evaluation_interval": INTERVAL},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [
            {
                "job_name": "sps2",
                "static_configs": [
                    {"targets": [target.address], "labels": dict(target.labels)} for target in targets
                ],
                "metric_relabel_configs": [{"action": "labeldrop", "regex": "exported_(group|rank)"}],
            }
        ],
    }
