"""A pytest plugin: every skip must be listed in tests/skips.toml with its reason, or a run in CI fails.

A skip is a test that did not run; a suite that may skip freely can be green and empty. Outside CI an unlisted
skip is only reported.
"""

import os
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SKIPS_FILE = Path(__file__).resolve().parent.parent / "skips.toml"
GATE = pytest.StashKey["SkipGate"]()


@dataclass(frozen=True)
class AllowedSkip:
    """One entry of skips.toml."""

    tests: re.Pattern[str]
    """Matched against the test's node id."""
    reason: re.Pattern[str]
    """Matched against the reason that the skip gives."""
    why: str
    """Why it is right that the test does not run."""

    def covers(self, nodeid: str, reason: str) -> bool:
        """Whether this entry allows that test to be skipped for that reason."""
        return bool(self.tests.search(nodeid) and self.reason.search(reason))


@dataclass(eq=False)  # pluggy keeps plugins in sets
class SkipGate:
    """Collects the skips of one run and says which are not allowed."""

    allowed: Sequence[AllowedSkip]
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def unlisted(self) -> Iterator[tuple[str, str]]:
        """(node id, reason) of each skip that no entry covers."""
        for nodeid, reason in self.skipped:
            if not any(entry.covers(nodeid, reason) for entry in self.allowed):
                yield nodeid, reason

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notes a skipped test; an expected failure (xfail) also reports as skipped but did run."""
        if report.skipped and not hasattr(report, "wasxfail"):
            self.skipped.append((report.nodeid, _reason(report)))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Notes a module that skipped itself as a whole."""
        if report.skipped:
            self.skipped.append((report.nodeid, _reason(report)))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Turns a green run with an unlisted skip into a failed one, in CI."""
        if in_ci() and session.exitstatus == pytest.ExitCode.OK and any(self.unlisted()):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Names each unlisted skip before pytest's closing line."""
        for nodeid, reason in self.unlisted():
            verdict = "FAILED" if in_ci() else "warning"
            terminalreporter.write_line(f"{verdict}: skip not listed in tests/skips.toml: {nodeid}: {reason}")


def in_ci() -> bool:
    """CI=true in the environment, as CI services set it."""
    return os.environ.get("CI", "").lower() in {"1", "true"}


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return str(report.longrepr)


def load_allowed(path: Path) -> list[AllowedSkip]:
    """The entries of skips.toml; each needs non-empty `tests`, `reason` (regular expressions) and `why`.

    Raises:
        ValueError: an entry lacks a key, holds an unknown one, or explains nothing.
    """
    entries = tomllib.loads(path.read_text(encoding="utf-8")).get("skip", [])
    for number, entry in enumerate(entries, 1):
        if set(entry) != {"tests", "reason", "why"} or not all(entry.values()):
            raise ValueError(
                f"{path}: entry {number} needs exactly tests, reason and why, none of them empty"
            )
    return [AllowedSkip(re.compile(e["tests"]), re.compile(e["reason"]), e["why"]) for e in entries]


def pytest_configure(config: pytest.Config) -> None:
    """Installs the gate for this run."""
    gate = SkipGate(load_allowed(SKIPS_FILE))
    config.stash[GATE] = gate
    config.pluginmanager.register(gate, "sps2-skip-gate")
