"""`sps2 scale`: groups of a deployment that `sps2 up` runs on this machine, more or fewer, while it serves."""

import json
import sys
from collections.abc import Iterable
from typing import Annotated

import typer

from sps2_cli.exits import ExitCode
from sps2_cli.local.control import Event, ask
from sps2_cli.local.scaling import parse_targets
from sps2_cli.options import DEFAULT_ADDRESS, Json, Server

ENDS = {"scaled": ExitCode.DONE, "refused": ExitCode.REFUSED, "failed": ExitCode.FAILED}


def scale(
    pools: Annotated[
        list[str], typer.Argument(metavar="POOL=GROUPS...", help="Groups that prefill or decode is to have.")
    ],
    server: Server = DEFAULT_ADDRESS,
    as_json: Json = False,
) -> None:
    """Adds groups to the pools of a running `sps2 up`, or drains groups and lets them go; returns when it is done.

    New groups have the shape of the others (ranks, threads, flags) and take requests as soon as they are ready. Of
    too many the youngest go: they take nothing more, finish what they have, and hand back what takes longer than the
    drain budget (`sps2 up --drain-timeout`, less 10 s) to be resumed on other groups. No request fails. A pool that is
    not named stays as it is. Ctrl-C leaves; the deployment goes on with what was asked of it.

    For example:

    ```
    sps2 scale prefill=3
    sps2 scale prefill=2 decode=4
    sps2 scale decode=1 --server 127.0.0.1:50052 --json
    ```
    """
    try:
        targets = parse_targets(pools)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    port = server.rpartition(":")[2]
    if not port.isdecimal():
        raise typer.BadParameter(f"--server {server!r} is not HOST:PORT")
    try:
        code = _tell(ask(int(port), {"scale": targets}), as_json=as_json)
    except OSError as error:
        message = (
            f"no `sps2 up` of yours serves port {port} on this machine ({error.strerror or error}); elsewhere "
            f"groups are scaled by who runs them"
        )
        _say({"event": "failed", "message": message}, as_json=as_json)
        raise typer.Exit(ExitCode.CANNOT_CONNECT) from error
    raise typer.Exit(code)


def _tell(events: Iterable[Event], *, as_json: bool) -> ExitCode:
    """Passes them on; the exit code that the last one means."""
    for event in events:
        _say(event, as_json=as_json)
        if (end := ENDS.get(event["event"])) is not None:
            return end
    _say({"event": "failed", "message": "`sps2 up` has ended"}, as_json=as_json)
    return ExitCode.FAILED


def _say(event: Event, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()
    elif "message" in event:
        word = "refused" if event["event"] == "refused" else "failed"
        sys.stderr.write(f"sps2: {word}: {event['message']}\n")
    elif event["event"] == "scaled":
        counts = ", ".join(f"{role} {count}" for role, count in event["groups"].items())
        sys.stdout.write(f"done; groups: {counts}\n")
    else:
        sys.stdout.write(event["text"] + "\n")
        sys.stdout.flush()
