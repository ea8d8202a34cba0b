"""The drill as tests have it: started, read step by step, and gone at the end."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.kubelet.namespaces import drill_command, drill_environment, obstacle
from support.process import ManagedProcess


class RunningDrill:
    """A drill that goes on."""

    def __init__(self, process: ManagedProcess) -> None:
        self._process = process
        self._num_read = 0

    def step(self, name: str, timeout: float) -> dict[str, Any]:
        """The figures of a step, as soon as it is done; steps are read in their order, each once.

        Raises:
            AssertionError: it failed, or one before it.
        """
        pattern = rf'^\{{"step": "({name}"|[^"]*", "took_s": [\d.]+, "error").*'
        line = self._process.wait_for_line(pattern, timeout, after=self._num_read).group(0)
        self._num_read = self._process.lines.index(line, self._num_read) + 1
        found: dict[str, Any] = json.loads(line)
        assert "error" not in found, f"step {found['step']}: {found['error']}"
        return found

    def finish(self, timeout: float) -> dict[str, Any]:
        """The figures of the last step, in which every pod is deleted; nothing is left then."""
        found = self.step("end", timeout)
        assert self._process.wait(timeout) == 0
        return found


@contextmanager
def drill(folder: Path, values: object, steps: list[str]) -> Iterator[RunningDrill]:
    """Runs the drill of a release, and ends it whatever happens; skips where there can be no node.

    Args:
        folder: An empty one; containers' logs stay in it.
        values: Of the chart.
        steps: Names from `support.kubelet.drill.STEPS`; `start` comes before them and `end` after.
    """
    if why := obstacle():
        pytest.skip(why)
    command = drill_command(folder, values, steps)
    process = ManagedProcess(command, name="drill", env=drill_environment(), stop_timeout=0.1)
    with process:
        yield RunningDrill(process)


def not_in_order(exits: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ends of containers that were not by themselves, with code 0, when they were told to and in time."""
    return [
        one
        for one in exits
        if one["code"] or one["killed"] or not one["asked"] or one["stop_s"] > one["grace_s"]
    ]
