"""A whole local deployment for tests: `sps2 up` as a user starts it, with real processes and weights."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sps2_client import Client
from support.process import ManagedProcess

ROOT = Path(__file__).resolve().parents[2]
DEMO_MODEL = ROOT / "models" / "demo"
READY_S = 120.0
SPS2 = (sys.executable, "-P", "-m", "sps2_cli")
"""The `sps2` program as this environment has it."""


@dataclass(frozen=True)
class LocalDeployment:
    """A deployment that is ready."""

    process: ManagedProcess
    """`sps2 up` itself."""
    address: str
    """host:port of the router."""
    pids: dict[str, int]
    """Process id of each child by name: redis, directory, router, prefill-0/0, ..."""
    metrics: dict[str, str]
    """host:port of each child's metrics by name, of those that serve them."""

    def client(self) -> Client:
        """A client of its router."""
        return Client(self.address)


@contextmanager
def deployment(
    model: Path = DEMO_MODEL,
    prefill: str = "1x2",
    decode: str = "1x2",
    arguments: Sequence[str] = (),
    program: Sequence[str] = SPS2,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Iterator[LocalDeployment]:
    """Starts `sps2 up` on free ports, yields it when it is ready, and ends it whatever happens."""
    command = [
        *(*program, "up", "--json", "--listen", "127.0.0.1:0"),
        # What "identical" means is defined for fp32; an option given twice counts as given last.
        *("--model", str(model), "--prefill", prefill, "--decode", decode, "--dtype", "fp32", *arguments),
    ]
    name = f"sps2 up {prefill} {decode}"
    with ManagedProcess(command, name=name, env=env, cwd=cwd, stop_timeout=30.0) as process:
        line = process.wait_for_line(r'^\{.*"event": ?"(ready|failed)".*\}$', READY_S).group(0)
        event = json.loads(line)
        assert event["event"] == "ready", event
        pids = {child["name"]: child["pid"] for child in event["processes"]}
        metrics = {child["name"]: child["metrics"] for child in event["processes"] if "metrics" in child}
        yield LocalDeployment(process, event["address"], pids, metrics)


def engine_pid(supervisor_pid: int) -> int:
    """The process id of the engine that a rank's supervisor runs."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                command = (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended while we looked
            if int(fields[1]) == supervisor_pid and b"worker.engine" in command:
                return int(entry.name)
    raise AssertionError(f"process {supervisor_pid} has no engine")
