"""`sps2 demo`: one long real prompt through a whole local deployment, its answer checked."""

import itertools
import json
import os
import random
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from sps2_cli.connect import open_client
from sps2_cli.documents import bytes_line, duration, generation_document
from sps2_cli.exits import ExitCode, reporting
from sps2_cli.facts import Task, is_right, load_facts, plant
from sps2_cli.local.plan import Pool
from sps2_cli.local.process import WRAPPER
from sps2_cli.options import Json
from sps2_cli.terminal import waiting
from sps2_cli.up import MODEL_OPTION, demo_model, pool
from sps2_client import Client, Generation, TextDelta

STOP_TIMEOUT_S = 60.0
READY_SLACK_S = 30.0
EXTRA_TOKENS = 64
"""Tokens asked for beyond the wanted length, for the cut at a word and for text that tokenizes shorter."""


class DemoError(Exception):
    """The demo could not be run; the message says why."""


def demo(
    model: Annotated[
        Path | None,
        MODEL_OPTION,
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=64, help="Tokens of the prompt, at least.")] = 6000,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the answer.")] = 16,
    seed: Annotated[int | None, typer.Option(help="Picks fact and place.", show_default="drawn")] = None,
    prefill: Annotated[
        Pool, typer.Option(parser=pool, metavar="GxR", help="Prefill groups x ranks in each.")
    ] = "1x2",  # type: ignore[assignment] # typer parses defaults too
    decode: Annotated[
        Pool, typer.Option(parser=pool, metavar="GxR", help="Decode groups x ranks in each.")
    ] = "1x2",  # type: ignore[assignment]
    ready_timeout: Annotated[float, typer.Option(min=1, help="Seconds until all must be ready.")] = 120.0,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for the answer.")] = 300.0,
    as_json: Json = False,
) -> None:
    """Starts a deployment, plants a random fact in a long text, asks for it, and checks the answer.

    Exits with 0 when the answer is right, else with 1.

    For example:

    ```
    sps2 demo
    sps2 demo --prompt-tokens 10000 --prefill 1x4 --decode 1x1 --seed 7
    ```
    """
    folder = model or demo_model()
    if folder is None:
        raise typer.BadParameter("no demo model here: give --model DIR")
    seed = secrets.randbelow(2**32) if seed is None else seed
    say = _silent if as_json else _say
    say(f"starting a deployment of {folder.name}: prefill {prefill}, decode {decode}")
    try:
        with (
            reporting(as_json=as_json),
            deployment(folder, prefill, decode, ready_timeout) as address,
            open_client(address) as client,
        ):
            text = excerpt(client, (folder / "prompt.txt").read_text(encoding="utf-8"), prompt_tokens)
            task = plant(text, load_facts(folder / "facts.json"), random.Random(seed))
            place = f"{task.position / len(text):.0%} of the text (seed {seed})"
            say(f'planted "{task.fact.strip()}" at {place}; asking "{task.question}"')
            answer = _answer(client, task, max_tokens, timeout, echo=not as_json)
    except (DemoError, OSError, ValueError) as error:
        sys.stderr.write(f"sps2 demo: {error}\n")
        raise typer.Exit(ExitCode.FAILED) from error
    _report(task, answer, seed, as_json)
    raise typer.Exit(ExitCode.DONE if is_right(answer.text, task.expected) else ExitCode.FAILED)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _silent(_: str) -> None:
    """With --json only the document is printed."""


@contextmanager
def deployment(model: Path, prefill: Pool, decode: Pool, ready_timeout: float) -> Generator[str]:
    """The address of a deployment that runs as a child and is drained at the end.

    Raises:
        DemoError: it did not come up (it has said why on stderr), or did not end cleanly.
    """
    arguments = {
        "--model": model,
        "--prefill": prefill,
        "--decode": decode,
        "--listen": "127.0.0.1:0",
        "--ready-timeout": ready_timeout,
    }
    flags = [str(part) for pair in arguments.items() for part in pair]
    up = (sys.executable, "-m", "sps2_cli", "up", "--json", "--quiet", *flags)
    child = subprocess.Popen([*WRAPPER, str(os.getpid()), *up], stdout=subprocess.PIPE, process_group=0)
    try:
        yield _ready(child, ready_timeout + READY_SLACK_S)["address"]
        child.send_signal(signal.SIGTERM)
        with waiting("draining"):
            code = child.wait(STOP_TIMEOUT_S)
        if code != 0:
            raise DemoError(f"the deployment ended with exit code {code}")
    except subprocess.TimeoutExpired as error:
        raise DemoError(f"the deployment did not end within {STOP_TIMEOUT_S:g} s") from error
    finally:
        _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ends the deployment whatever state it is in: politely first, since it has children to end."""
    child.terminate()
    try:
        child.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait(10)
    if child.stdout is not None:
        child.stdout.close()


def _ready(child: subprocess.Popen[bytes], timeout: float) -> dict[str, Any]:
    """The `ready` line of `sps2 up --json`."""
    assert child.stdout is not None
    deadline = time.monotonic() + timeout
    received = b""
    while not received.endswith(b"\n"):
        if not select.select([child.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise DemoError(f"the deployment was not ready after {timeout:g} s")
        chunk = os.read(child.stdout.fileno(), 65536)
        if not chunk:
            raise DemoError("the deployment did not start")
        received += chunk
    event: dict[str, Any] = json.loads(received.splitlines()[0])
    if event["event"] != "ready":
        raise DemoError("the deployment did not start")
    return event


def excerpt(client: Client, text: str, num_tokens: int) -> str:
    """At least `num_tokens` tokens of `text`, repeated when it is too short, cut at a word."""
    token_ids = client.tokenize(text)
    wanted = num_tokens + EXTRA_TOKENS
    if len(token_ids) < wanted:
        text = "\n\n".join([text] * (wanted // len(token_ids) + 1))
        token_ids = client.tokenize(text)
    return client.detokenize(token_ids[:wanted]).rpartition(" ")[0]


def _answer(client: Client, task: Task, max_tokens: int, timeout: float, *, echo: bool) -> Generation:
    with client.stream(task.prompt, max_tokens=max_tokens, timeout=timeout) as stream:
        with waiting("reading the prompt"):
            first = next(stream)
        if echo:
            sys.stdout.write("answer:")
            for event in itertools.chain([first], stream):
                sys.stdout.write(event.text if isinstance(event, TextDelta) else "")
                sys.stdout.flush()
            sys.stdout.write("\n")
        return stream.final()


def _report(task: Task, answer: Generation, seed: int, as_json: bool) -> None:
    right = is_right(answer.text, task.expected)
    if as_json:
        document = {
            "right": right,
            "expected": task.expected,
            "fact": task.fact,
            "position_chars": task.position,
            "seed": seed,
            **generation_document(answer),
        }
        sys.stdout.write(json.dumps(document) + "\n")
        return
    timings = answer.usage.timings
    _say(f"{'right' if right else 'WRONG'}: expected {task.expected}")
    _say(f"{answer.usage.prompt_tokens:,} prompt tokens; {answer.usage.output_tokens} tokens generated")
    _say(f"ttft {duration(timings.ttft)}, tpot {duration(timings.tpot)}")
    _say(bytes_line(answer.usage.bytes_moved))
