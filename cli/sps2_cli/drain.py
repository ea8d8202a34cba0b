"""`sps2 drain`: lets one group of a deployment leave, wherever it runs."""

import json
import sys
from typing import Annotated

import typer

from sps2_cli.exits import reporting
from sps2_cli.options import DEFAULT_ADDRESS, Json, Server
from sps2_client import Client


def drain(
    group: Annotated[str, typer.Argument(help="The group, as `sps2 status` names it.")],
    server: Server = DEFAULT_ADDRESS,
    as_json: Json = False,
) -> None:
    """Drains a group: it takes nothing more, finishes what it has, hands back the rest, and its processes end.

    Returns as soon as that has begun; `sps2 status` shows the group as draining until it has left. What runs the
    group may start it again: Kubernetes does, `sps2 up` does not.

    For example:

    ```
    sps2 drain decode-1
    sps2 drain prefill-0 --server 10.0.0.5:50051
    ```
    """
    with reporting(as_json=as_json), Client(server) as client:
        budget_s = client.drain_group(group)
        if as_json:
            sys.stdout.write(json.dumps({"group": group, "budget_s": budget_s}) + "\n")
        else:
            sys.stdout.write(f"{group} is draining; its requests have {budget_s:g} s to finish\n")
