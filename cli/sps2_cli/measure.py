"""`sps2 bench ...` and `sps2 eval ...`: handed on as they are to the benchmarks, a process of their own.

Those need torch, which this command must start without.
"""

import importlib.util
import os
import subprocess
import sys

import typer

from sps2_cli.exits import ExitCode
from sps2_cli.local.process import WRAPPER

PACKAGE = "sps2_bench"


def bench(context: typer.Context) -> None:
    """Measures speed, bytes and memory beside baselines; see `sps2 bench --help`.

    For example:

    ```
    sps2 bench prefill --lengths 2k,32k --baselines transformers --plots out
    sps2 bench decode --contexts 2k,16k --batches 1,8 --baselines transformers
    sps2 bench kernels --json
    ```
    """
    _hand_on("bench", context.args)


def evaluate(context: typer.Context) -> None:
    """Measures what sparse attention costs in accuracy; see `sps2 eval --help`.

    For example:

    ```
    sps2 eval accuracy --model models/demo --plots out
    ```
    """
    _hand_on("eval", context.args)


def _hand_on(group: str, arguments: list[str]) -> None:
    """Runs the benchmarks with these arguments and exits as they do."""
    if importlib.util.find_spec(PACKAGE) is None:
        sys.stderr.write("sps2: the benchmarks are not installed: pip install 'sps2[bench]'\n")
        raise typer.Exit(ExitCode.FAILED)
    command = (sys.executable, "-P", "-m", PACKAGE, group, *arguments)
    child = subprocess.Popen([*WRAPPER, str(os.getpid()), *command])
    try:
        code = child.wait()
    except KeyboardInterrupt:
        child.wait()  # the terminal has interrupted it as well
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    raise typer.Exit(code if code >= 0 else ExitCode.FAILED)
