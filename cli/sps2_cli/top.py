"""`sps2 top`: pools, groups and ranks at work, live."""

import json
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich import box
from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table

from sps2_cli.documents import size, status_document
from sps2_cli.exits import ExitCode, reporting
from sps2_cli.options import DEFAULT_ADDRESS, Json, Server
from sps2_cli.rates import with_rates
from sps2_cli.status import STATE_STYLES, pool_line
from sps2_client import Client

BAR_WIDTH = 16
COLUMNS = (
    ("rank", "left"),
    ("state", "left"),
    ("KV", "left"),
    ("used", "right"),
    ("run", "right"),
    ("wait", "right"),
    ("tokens", "right"),
    ("steps/s", "right"),
    ("sent/s", "right"),
)


def top(
    server: Server = DEFAULT_ADDRESS,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 1.0,
    once: Annotated[
        bool, typer.Option("--once", help="Two looks, an interval apart, and the rates between them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Shows what each rank does, live until Ctrl-C: KV in use, queues, steps and bytes each second.

    Steps are decode steps, and slices of layers of a prefill; bytes are those sent to other ranks.

    For example:

    ```
    sps2 top
    sps2 top --server 10.0.0.5:50051 --interval 0.5
    sps2 top --once --json | jq '.pools.decode[].ranks[].steps_per_s'
    ```
    """
    with reporting(as_json=as_json), Client(server) as client:
        documents = looks(client, server, interval)
        try:
            if once:
                next(documents)
                _print(next(documents), as_json=as_json)
            elif as_json:
                for document in documents:
                    _print(document, as_json=True)
            else:
                with Live(console=Console(), auto_refresh=False, screen=Console().is_terminal) as live:
                    for document in documents:
                        live.update(render(document), refresh=True)
        except KeyboardInterrupt:
            raise typer.Exit(ExitCode.INTERRUPTED if once else ExitCode.DONE) from None


def looks(client: Client, server: str, interval: float) -> Iterator[dict[str, Any]]:
    """Documents without end, each with the rates since the one before."""
    before, looked_at = None, time.monotonic()
    while True:
        now = status_document(server, client.cluster_state())
        before_at, looked_at = looked_at, time.monotonic()
        yield with_rates(before, now, looked_at - before_at)
        before = now
        time.sleep(interval)


def _print(document: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(document) + "\n")
        sys.stdout.flush()
    else:
        Console().print(render(document))


def render(document: dict[str, Any]) -> RenderableType:
    """The document as a table of ranks for each pool."""
    away = "" if document["directory_connected"] else "   the directory is away: the picture may be old"
    queued = f"{document['num_queued_tokens']:,} tokens queued"
    head = f"{document['address']}   {document['num_requests_live']} requests   {queued}{away}"
    return Group(head, *(_pool(role, groups) for role, groups in document["pools"].items()))


def _pool(role: str, groups: list[dict[str, Any]]) -> Table:
    num_requests = sum(group["num_requests_live"] for group in groups)
    table = Table(
        title=f"{role}: {pool_line(groups)}; {num_requests} requests",
        title_justify="left",
        box=box.SIMPLE,
        pad_edge=False,
    )
    for name, side in COLUMNS:
        table.add_column(name, justify="right" if side == "right" else "left", no_wrap=True)
    for group in groups:
        for rank in group["ranks"]:
            table.add_row(*_cells(rank), end_section=rank is group["ranks"][-1])
    return table


def _cells(rank: dict[str, Any]) -> list[RenderableType]:
    total, used = rank["kv_blocks_total"], rank["kv_blocks_used"]
    return [
        rank["worker_id"],
        f"[{STATE_STYLES.get(rank['state'], 'red')}]{rank['state']}[/]",
        Bar(max(1, total), 0, used, width=BAR_WIDTH),
        f"{used:,}/{total:,}",
        str(rank["num_requests_running"]),
        str(rank["num_requests_waiting"]),
        f"{rank['queued_tokens']:,}",
        f"{rank['steps_per_s']:,.1f}",
        size(rank["posted_bytes_per_s"]),
    ]
