"""`sps2 bench directory`: options in, figures out."""

import asyncio
import gc
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer

from sps2_bench.directory.load import CHAIN_KEYS, DirectoryLoad, Latencies
from sps2_bench.directory.servers import directory_servers
from sps2_bench.drawing import figure
from sps2_bench.machine import describe_machine
from sps2_bench.output import Json, Plots, print_json, print_table, say

LOOKUP_CALLERS = 2
UNARY_CALLERS = 8
UNARY_PER_S = 1000.0
"""The load that a directory is to bear; latency is measured at half of it."""


def directory(
    workers: Annotated[int, typer.Option(min=1, help="Workers that renew their leases.")] = 1000,
    group_size: Annotated[
        int, typer.Option(min=1, help="Ranks of a group; one call renews for all of them.")
    ] = 8,
    requests: Annotated[int, typer.Option(min=1, help="Live requests.")] = 100_000,
    chains: Annotated[int, typer.Option(min=1, help="Cached prefixes of 64 blocks.")] = 500,
    seconds: Annotated[float, typer.Option(min=0.5, help="Length of each measurement.")] = 20.0,
    ttl: Annotated[float, typer.Option(min=1.0, help="Seconds that a lease lasts.")] = 5.0,
    as_json: Json = False,
    plots: Plots = None,
) -> None:
    """The KV directory over Redis, beside all of its workers' heartbeats: lookups, calls, lease expiry.

    Servers and load share the cores of this machine.

    For example:

    ```
    sps2 bench directory --workers 100 --requests 1000 --seconds 5
    ```
    """
    with directory_servers(ttl) as address:
        measured = asyncio.run(_measure(address, workers, group_size, requests, chains, seconds))
    samples: dict[str, Latencies] = measured.pop("samples")
    written = [_plot(samples, plots / "directory.png")] if plots else []
    if as_json:
        settings = {
            "workers": workers,
            "group_size": group_size,
            "requests": requests,
            "chains": chains,
            "seconds": seconds,
        }
        document = {"machine": describe_machine(), "settings": settings, **measured}
        print_json({**document, "plots": [str(path) for path in written]})
        return
    print_table(("figure", "value"), [(name, f"{value:,.2f}") for name, value in measured.items()])
    for path in written:
        say(f"wrote {path}")


async def _measure(
    address: str, workers: int, group_size: int, requests: int, chains: int, seconds: float
) -> dict[str, Any]:
    async with grpc.aio.insecure_channel(address) as channel:
        load = DirectoryLoad(channel, workers, group_size, requests, chains)
        say(f"registers {workers:,} workers, records {requests:,} requests and {chains:,} prefixes")
        await load.fill()
        gc.collect()
        gc.freeze()  # the pauses of this process are not the directory's
        async with _renewing(load):
            say("looks prefixes up")
            lookups = await load.closed_loop(load.lookup, LOOKUP_CALLERS, seconds)
            say("makes calls at full load, then at half of what is asked")
            unary = await load.closed_loop(load.unary, UNARY_CALLERS, seconds)
            half = await load.open_loop(load.unary, UNARY_PER_S / 2, seconds)
        say("lets leases expire")
        expiries = await load.expiries(min(10, workers))
    return {
        "lookups_per_s": CHAIN_KEYS * lookups.per_s,
        "p99_ms": 1e3 * lookups.quantile(0.99),
        "p50_ms": 1e3 * lookups.quantile(0.5),
        "unary_per_s": unary.per_s,
        "unary_p99_ms": 1e3 * unary.quantile(0.99),
        "half_load_per_s": half.per_s,
        "half_load_p99_ms": 1e3 * half.quantile(0.99),
        "renewals_per_s": workers / load.interval_s,
        "expiry_s": max(expiries),
        "ttl_s": load.ttl_s,
        "samples": {"lookups of 64 keys": lookups, "calls at full load": unary, "calls at half load": half},
    }


@asynccontextmanager
async def _renewing(load: DirectoryLoad) -> AsyncGenerator[None]:
    """Every worker's heartbeats beside what is measured. A heartbeat that fails, fails the measurement."""
    task = asyncio.create_task(load.renew(load.workers))
    try:
        yield
        if task.done():
            task.result()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def _plot(samples: dict[str, Latencies], path: Path) -> Path:
    with figure(path) as axes:
        for name, latencies in samples.items():
            ordered = sorted(1e3 * one for one in latencies.seconds)
            shares = [(index + 1) / len(ordered) for index in range(len(ordered))]
            axes.plot(ordered, shares, label=f"{name}: {latencies.per_s:,.0f} calls/s")
        axes.axhline(0.99, color="grey", linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set(xlabel="ms", ylabel="share of calls answered within")
        axes.grid(alpha=0.3)
        axes.legend()
    return path
