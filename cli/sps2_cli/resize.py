"""`sps2 resize`: over how many decode ranks the KV of a request lies, while it is being answered."""

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from sps2_cli.connect import open_client
from sps2_cli.documents import duration
from sps2_cli.exits import reporting
from sps2_cli.options import DEFAULT_ADDRESS, Json, Server


def resize(
    request_id: Annotated[str, typer.Argument(help="The request, as `generate --request-id` named it.")],
    degree: Annotated[
        int,
        typer.Option(
            min=1, help="Holders of its KV: decode ranks, or, where ranks split layers, sets of them."
        ),
    ],
    server: Server = DEFAULT_ADDRESS,
    rank: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            help="Which holders, once for each, by sequence index; without it, those that need least be moved.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Spreads a request's KV over another number of decode ranks; its stream goes on meanwhile.

    For example:

    ```
    sps2 resize my-request --degree 4
    sps2 resize my-request --degree 2 --rank 1 --rank 3
    ```
    """
    with reporting(as_json=as_json), open_client(server) as client:
        done = client.resize(request_id, degree, ranks=rank or ())
        if as_json:
            sys.stdout.write(json.dumps(asdict(done)) + "\n")
        else:
            ranks = ", ".join(str(one) for one in done.holders)
            sys.stdout.write(
                f"{request_id} lies on ranks {ranks} of {done.group} (home {done.home}): "
                f"{done.num_blocks_moved} blocks moved, longest gap {duration(done.longest_gap_s)}, "
                f"median before it {duration(done.median_gap_s)}\n"
            )
