"""`python -m support.kubelet FOLDER VALUES STEP...`, on a node of its own (`namespaces.drill_command`): the drill.

Prints one line of JSON for each step; a step that fails is the last one.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.chart import render
from support.kubelet.cluster import release
from support.kubelet.drill import STEPS, Drill


def tell(step: str, began: float, **figures: Any) -> None:
    """The line of one step."""
    line = {"step": step, "took_s": round(time.monotonic() - began, 2), **figures}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def find(step: str) -> Callable[[Drill], dict[str, Any]]:
    """The function of a step."""
    if step in STEPS:
        return STEPS[step]
    from support.kubelet import under_load  # torch, which takes seconds

    return under_load.STEPS[step]


def main(folder: Path, values: dict[str, Any], steps: list[str]) -> int:
    """Starts the release and takes the steps; then every pod is deleted, which is the step `end`."""
    rendered, began, step = render(values), time.monotonic(), "start"
    work = [(name, find(name)) for name in ["start", *steps]]
    try:
        with release(rendered, folder) as running:
            drill = Drill(running, rendered)
            for step, take in work:
                began = time.monotonic()
                tell(step, began, **take(drill))
            step, began = "end", time.monotonic()
        tell(step, began, **drill.exits())
    except BaseException:  # noqa: BLE001 - told to the test, which fails by it
        tell(step, began, error=traceback.format_exc())
        return 1
    return 0


if __name__ == "__main__":
    # Containers are started while gRPC runs in this process; its fork handlers would run between fork and exec.
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    sys.exit(main(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]))
