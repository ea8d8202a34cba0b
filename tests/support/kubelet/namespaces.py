"""Whether a node can be made on this machine, and the command that makes one and runs the drill in it."""

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
TOOLS = ("unshare", "nsenter", "ip", "bwrap")
NODE = (
    "unshare",
    "--user",
    "--map-root-user",
    "--mount",
    "--net",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
)
"""A user of all rights over namespaces of its own; whatever runs in them ends with the first process."""
TRIED = (
    "ip link add br0 type bridge && mount -t sysfs sysfs /sys && "
    "bwrap --unshare-user --unshare-pid --uid 10001 --ro-bind / / --proc /proc --dev /dev true"
)
"""What a node and its containers need."""
PROBE_S = 20.0


@functools.cache
def obstacle() -> str:
    """Why there can be no node here; empty: there can."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"{missing[0]} is not installed"
    command = [*NODE, "sh", "-c", TRIED]
    tried = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_S, check=False)
    return f"no namespaces: {tried.stderr.strip()}" if tried.returncode else ""


def drill_command(folder: Path, values: object, steps: list[str]) -> list[str]:
    """The drill of a release with these values, as a process of its own on a node of its own.

    It prints one line of JSON for each step. Containers' logs stay in `folder`.
    """
    drill = [sys.executable, "-P", "-m", "support.kubelet", str(folder), json.dumps(values), *steps]
    return [*NODE, *drill]


def drill_environment() -> dict[str, str]:
    """Where the drill finds its modules, beside what the tests themselves have."""
    return {"PYTHONPATH": ":".join([str(ROOT), str(ROOT / "tests"), *(path for path in sys.path if path)])}
