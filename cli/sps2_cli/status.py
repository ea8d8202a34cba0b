"""`sps2 status`: pools, groups and ranks as the router last heard of them."""

import json
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table

from sps2_cli.connect import open_client
from sps2_cli.documents import status_document
from sps2_cli.exits import reporting
from sps2_cli.options import DEFAULT_ADDRESS, Json, Server
from sps2_client import Client

MOVES = ("num_resizes", "num_blocks_moved")
STATE_STYLES = {"ready": "green", "starting": "yellow", "draining": "magenta"}


def status(
    server: Server = DEFAULT_ADDRESS,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again and again until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between looks, with --watch.")] = 1.0,
    as_json: Json = False,
) -> None:
    """Shows pools, groups, ranks, their state, KV use and queues.

    For example:

    ```
    sps2 status
    sps2 status --server 10.0.0.5:50051 --watch
    sps2 status --json | jq '.pools.decode[].ranks[].kv_blocks_used'
    ```
    """
    with reporting(as_json=as_json), open_client(server) as client:
        documents = _documents(client, server, interval if watch else None)
        if as_json:
            for document in documents:
                sys.stdout.write(json.dumps(document) + "\n")
                sys.stdout.flush()
        elif watch:
            with Live(console=Console(), auto_refresh=False) as live:
                for document in documents:
                    live.update(render(document), refresh=True)
        else:
            Console().print(render(next(documents)))


def _documents(client: Client, server: str, interval: float | None) -> Iterator[dict[str, Any]]:
    """One document, or with an interval one after the other without end."""
    yield status_document(server, client.cluster_state())
    while interval is not None:
        time.sleep(interval)
        yield status_document(server, client.cluster_state())


def render(document: dict[str, Any]) -> RenderableType:
    """The document as a table for each pool."""
    connected = "connected" if document["directory_connected"] else "away: the picture may be old"
    requests = f"requests {document['num_requests_live']}   tokens queued {document['num_queued_tokens']:,}"
    head = f"router {document['address']}   {requests}   directory {connected}"
    return Group(head, *(_pool_table(role, groups) for role, groups in document["pools"].items()))


def _pool_table(role: str, groups: list[dict[str, Any]]) -> Table:
    title = f"{role}: {pool_line(groups)}"
    moved = [sum(rank[kind] for group in groups for rank in group["ranks"]) for kind in MOVES]
    if any(moved):
        title += f"; {moved[0]} resizes, {moved[1]:,} KV blocks moved from rank to rank"
    if control := max((rank["control_share"] for group in groups for rank in group["ranks"]), default=0.0):
        title += f"; control {control:.1%} of a step"
    title += _cache(groups)
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for name in ("rank", "state", "loaded", "KV blocks", "run", "wait", "tokens", "device"):
        table.add_column(
            name, justify="left" if name in {"rank", "state", "device"} else "right", no_wrap=True
        )
    for group in groups:
        for rank in group["ranks"]:
            table.add_row(*_cells(rank), end_section=rank is group["ranks"][-1])
    return table


def pool_line(groups: list[dict[str, Any]]) -> str:
    """How many groups are there, and in which state: "2 of 3 groups ready, 1 draining"."""
    states = [group["state"] for group in groups]
    line = f"{states.count('ready')} of {len(groups)} groups ready"
    others = (state for state in ("starting", "draining") if state in states)
    return ", ".join([line, *(f"{states.count(state)} {state}" for state in others)])


def _cache(groups: list[dict[str, Any]]) -> str:
    """What the ranks keep for later prompts, and how much of the prompts so far came from it."""
    ranks = [rank for group in groups for rank in group["ranks"]]
    blocks, prompt, cached = (
        sum(rank[kind] for rank in ranks) for kind in ("kv_blocks_cached", "prompt_tokens", "cached_tokens")
    )
    return f"; {blocks:,} KV blocks cached, {cached / prompt:.0%} of prompts from cache" if prompt else ""


def _cells(rank: dict[str, Any]) -> list[str]:
    total, used = rank["kv_blocks_total"], rank["kv_blocks_used"]
    style = STATE_STYLES.get(rank["state"], "red")
    return [
        rank["worker_id"],
        f"[{style}]{rank['state']}[/]",
        f"{rank['load_fraction']:.0%}",
        f"{used:,}/{total:,} ({used / total:.0%})" if total else f"{used:,}",
        str(rank["num_requests_running"]),
        str(rank["num_requests_waiting"]),
        f"{rank['queued_tokens']:,}",
        f"{rank['device']} {rank['dtype']}{_part(rank)}",
    ]


def _part(rank: dict[str, Any]) -> str:
    """Which part of the model it holds, where that is not all."""
    of = rank["tensor_ranks"]
    return f", part {rank['rank'] % of + 1}/{of}" if of > 1 else ""
