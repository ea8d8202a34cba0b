"""`sps2 bench kernels`: options in, rows out."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from sps2_bench.drawing import figure
from sps2_bench.kernel_rates.cases import KernelCase, Shape, list_kernels
from sps2_bench.kernel_rates.roofline import Roofline, measure_roofline
from sps2_bench.kernel_rates.timing import seconds
from sps2_bench.machine import describe_machine
from sps2_bench.options import DTYPES, parse_counts, parse_names
from sps2_bench.output import Json, Plots, print_json, print_table, say


def kernels(
    sizes: Annotated[str, typer.Option(help="Tokens, such as 1k,8k.")] = "1k,4k,16k",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or both.")] = "fp32,bf16",
    threads: Annotated[int, typer.Option(min=1, help="Threads on the CPU: a rank has one.")] = 1,
    repeat: Annotated[int, typer.Option(min=1, help="Calls of a kernel at most.")] = 20,
    budget: Annotated[float, typer.Option(min=0.0, help="Seconds for one kernel's calls.")] = 3.0,
    as_json: Json = False,
    plots: Plots = None,
) -> None:
    """Each kernel against its roofline (measured) and torch's best; on a GPU too where there is one.

    For example:

    ```
    sps2 bench kernels --sizes 4k --dtype fp32 --plots out
    ```
    """
    lengths, dtypes = parse_counts(sizes), parse_names(dtype, DTYPES)
    torch.set_num_threads(threads)
    rows = []
    for device in _devices():
        for name in dtypes:
            roof = measure_roofline(device, DTYPES[name], repeat, budget)
            say(
                f"{device} {name}: {roof.flops_per_s / 1e9:.0f} GFLOP/s matrix product, "
                f"{roof.bytes_per_s / 1e9:.1f} GB/s copy"
            )
            for size in lengths:
                rows += [
                    _measure(case, device, name, roof, repeat, budget)
                    for case in list_kernels(device, DTYPES[name], size, Shape())
                ]
    _report(rows, as_json, plots)


def _devices() -> Iterator[torch.device]:
    yield torch.device("cpu")
    if torch.cuda.is_available():
        yield torch.device("cuda")


@torch.inference_mode()
def _measure(
    case: KernelCase, device: torch.device, dtype: str, roof: Roofline, repeat: int, budget: float
) -> dict[str, Any]:
    ours = seconds(case.run, device, repeat, budget)
    torchs = seconds(case.torch_best, device, repeat, budget) if case.torch_best else None
    return {
        "device": device.type,
        "dtype": dtype,
        "kernel": case.kernel,
        "form": case.form,
        "size": case.size,
        "seconds": ours,
        "flops_per_s": case.flops / ours,
        "bytes_per_s": case.moved / ours,
        "roofline_s": roof.seconds(case.flops, case.moved),
        "of_roofline": roof.seconds(case.flops, case.moved) / ours,
        "torch_s": torchs,
        "times_torch": torchs / ours if torchs else None,
    }


def _report(rows: list[dict[str, Any]], as_json: bool, plots: Path | None) -> None:
    written = [_plot(rows, plots / "kernels.png")] if plots else []
    if as_json:
        print_json({"machine": describe_machine(), "rows": rows, "plots": [str(path) for path in written]})
        return
    columns = ("device", "dtype", "kernel", "form", "size", "ms", "GFLOP/s", "GB/s", "of roofline", "x torch")
    print_table(columns, [_cells(row) for row in rows])
    for path in written:
        say(f"wrote {path}")


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["device"],
        row["dtype"],
        row["kernel"],
        row["form"],
        f"{row['size']:,}",
        f"{1e3 * row['seconds']:.3f}",
        f"{row['flops_per_s'] / 1e9:.1f}",
        f"{row['bytes_per_s'] / 1e9:.1f}",
        f"{row['of_roofline']:.0%}",
        f"{row['times_torch']:.2f}" if row["times_torch"] else "",
    ]


def _plot(rows: list[dict[str, Any]], path: Path) -> Path:
    largest = max(row["size"] for row in rows)
    shown = [row for row in rows if row["size"] == largest]
    labels = [f"{row['kernel']} {row['form']} {row['device']} {row['dtype']}" for row in shown]
    with figure(path) as axes:
        axes.barh(labels, [100 * row["of_roofline"] for row in shown])
        axes.tick_params(axis="y", labelsize=6)
        axes.set(xlabel=f"% of the measured roofline at {largest:,} tokens")
    return path
