"""`sps2 up` as the child of a benchmark: a whole deployment on this machine, ended whatever happens."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models

from sps2_bench.processes import END_TIMEOUT_S, WorkerError

CONTROL_PLANE = frozenset({"redis", "directory", "router"})
"""Names of the processes that belong to no pool."""


def write_word_tokenizer(folder: Path, vocab_size: int) -> None:
    """Writes a tokenizer with a word for each id, so that a model of random weights can be served."""
    vocabulary = {f"t{token_id}": token_id for token_id in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))  # noqa: S106 - a word
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))


@contextmanager
def deployment(model: Path, arguments: Sequence[str], control_cpus: Sequence[int]) -> Iterator[str]:
    """Starts `sps2 up` with these arguments and yields the router's host:port once every group is ready.

    Args:
        model: a checkpoint folder with a tokenizer.
        arguments: of `sps2 up`, but for the model and where it listens.
        control_cpus: cores of redis, directory and router; workers run where `arguments` say.

    Raises:
        WorkerError: it did not come up.
    """
    command = [sys.executable, "-P", "-m", "sps2_cli", "up", "--json", "--quiet", "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(
        [*command, "--model", str(model), *arguments], stdout=subprocess.PIPE, text=True
    )
    try:
        ready = _await_ready(process)
        for child in ready["processes"]:
            if child["name"] in CONTROL_PLANE:
                pin_process(child["pid"], control_cpus)
        yield ready["address"]
    finally:
        process.terminate()
        try:
            process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()  # its children end with it
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _await_ready(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """What it says when it is ready; it gives up by itself when that takes too long."""
    assert process.stdout is not None
    for line in process.stdout:
        event: dict[str, Any] = json.loads(line)
        if event["event"] == "ready":
            return event
        if event["event"] == "failed":
            raise WorkerError(f"sps2 up: {event['message']}")
    raise WorkerError(f"sps2 up ended with exit code {process.wait()}")


def pin_process(pid: int, cpus: Sequence[int]) -> None:
    """Moves every thread of a process to these cores; those it starts later inherit them."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), cpus)
