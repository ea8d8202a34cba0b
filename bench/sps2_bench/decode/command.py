"""`sps2 bench decode`: options in, rows out."""

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from sps2_bench.decode.cases import BASELINES, MOVES, Case, Row, Sample, list_cases, slopes
from sps2_bench.decode.plots import engine_size, write_plots
from sps2_bench.decode.run import run_cases
from sps2_bench.machine import describe_machine
from sps2_bench.model_choice import chosen_config
from sps2_bench.options import DTYPES, parse_counts, parse_names
from sps2_bench.output import Json, Plots, print_json, print_table, say
from sps2_bench.prefill.random_model import write_random_model
from sps2_bench.processes import WorkerError, available_cpus
from sps2_engine.models import ModelConfig


def decode(
    contexts: Annotated[str, typer.Option(help="Tokens before the first step, such as 2k,16k.")] = "2k,16k",
    batches: Annotated[str, typer.Option(help="Rows that decode together.")] = "1,8",
    ranks: Annotated[str, typer.Option(help="Decode degrees; the cores are dealt among the ranks.")] = "1,2",
    tensor: Annotated[
        str, typer.Option(help="Tensor degrees: each of the ranks is so many, which split every layer.")
    ] = "1",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or both; KV stays fp32.")] = "fp32",
    move: Annotated[
        str, typer.Option(help="q, kv or both; kv brings all KV home in each step, to price it.")
    ] = "q",
    steps: Annotated[int, typer.Option(min=2, help="Counted steps of a run.")] = 32,
    repeat: Annotated[int, typer.Option(min=1, help="Runs of each case.")] = 3,
    baselines: Annotated[str, typer.Option(help="transformers (both its caches), or nothing.")] = "",
    share_cores: Annotated[
        bool, typer.Option(help="Let ranks outnumber the cores: for bytes, not for speed.")
    ] = False,
    random_model: Annotated[str, typer.Option(metavar="KEY=N,...", help="Sizes of the random model.")] = "",
    model: Annotated[Path | None, typer.Option(help="A checkpoint folder instead.", exists=True)] = None,
    as_json: Json = False,
    plots: Plots = None,
) -> None:
    """Tokens per second, time between tokens and bytes moved, over context x batch x decode degree.

    The context is not computed: its KV is random, the same values for every program, and decoding is greedy, so
    that the token streams of all programs can be compared (`same_streams` counts the rows that are equal).
    With --tensor each of the ranks is a few that split every layer; what these sum and gather is counted apart.
    Speed-ups are against transformers as `generate` runs it (dynamic cache), and with its static cache. With --plots
    the folder also gets the rows, decode.json.

    For example:

    ```
    sps2 bench decode --baselines transformers --plots out
    sps2 bench decode --contexts 1k,4k,16k,64k --batches 1 --ranks 2,4 --move q,kv --share-cores
    ```
    """
    cases = list(
        list_cases(
            parse_counts(contexts),
            parse_counts(batches),
            parse_counts(ranks),
            parse_names(dtype, DTYPES),
            parse_names(move, MOVES),
            parse_names(baselines, BASELINES) if baselines else (),
            parse_counts(tensor),
        )
    )
    config = chosen_config(model, random_model)
    _refuse_impossible(cases, config, steps, share_cores=share_cores)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder = model or write_random_model(config, Path(scratch))
            samples, threads = run_cases(
                cases, folder, available_cpus(), steps, repeat, _progress, share_cores=share_cores
            )
    except WorkerError as error:
        say(f"sps2 bench decode: {error}")
        raise typer.Exit(1) from error
    rows = [Row(case, tuple(samples[case]), threads[case.engine], config) for case in cases]
    _report([row.document(rows) for row in rows], as_json, plots)


def _refuse_impossible(cases: list[Case], config: ModelConfig, steps: int, *, share_cores: bool) -> None:
    """Before any process is started."""
    cores = len(available_cpus())
    for case in cases:
        if case.engine.processes > cores and not share_cores:
            raise typer.BadParameter(
                f"{case.engine.processes} ranks want as many cores; there are {cores} (--share-cores for bytes)"
            )
        if case.context + steps > config.max_position:
            raise typer.BadParameter(
                f"{case.context} tokens are too many for {config.max_position} positions"
            )


def _progress(round_: int, case: Case, sample: Sample) -> None:
    say(
        f"run {round_ + 1}: {case.batch} x {case.context} tokens, {_engine_name(case)}: "
        f"{sum(sample.step_s) / len(sample.step_s) * 1e3:.2f} ms a step"
    )


def _engine_name(case: Case) -> str:
    engine = case.engine
    return f"{engine.program} {engine.form} {engine.dtype} on {engine.ranks}x{engine.tensor}"


def _report(rows: list[dict[str, Any]], as_json: bool, plots: Path | None) -> None:
    machine, sloped = describe_machine(), slopes(rows)
    document = {"machine": machine, "rows": rows, "slopes": sloped}
    written: list[Path] = []
    if plots:
        written = [*write_plots(rows, plots), plots / "decode.json"]
        written[-1].write_text(json.dumps(document, indent=1), encoding="utf-8")
    if as_json:
        print_json({**document, "plots": [str(path) for path in written]})
        return
    columns = ("context", "batch", "program", "form", "dtype", "ranks", "tokens/s", "TBT p50 ms", "p99 ms",
               "speed-up", "static", "same streams", "bytes/token", "planned", "GB/s read")  # fmt: skip
    print_table(columns, [_cells(row) for row in rows])
    for one in sloped:
        slope = one["bytes_per_token_and_context_token"]
        say(
            f"{one['form']} on {one['ranks']} ranks, batch {one['batch']}: {slope:.3f} bytes/token per context token"
        )
    say(f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, {machine['date']}")
    for path in written:
        say(f"wrote {path}")


def _cells(row: dict[str, Any]) -> list[str]:
    compared = row["speedup"] is not None
    return [
        f"{row['context']:,}",
        f"{row['batch']}",
        row["program"],
        row["form"],
        row["dtype"],
        engine_size(row),
        f"{row['tokens_per_s']:.1f}",
        f"{row['tbt_p50_s'] * 1e3:.2f}",
        f"{row['tbt_p99_s'] * 1e3:.2f}",
        f"{row['speedup']:.2f}" if compared else "",
        f"{row['speedup_static']:.2f}" if compared else "",
        f"{row['same_streams']}/{row['batch']}" if compared else "",
        _bytes(row, ""),
        _bytes(row, "planned_"),
        f"{row['read_bytes_per_s'] / 1e9:.1f}",
    ]


def _bytes(row: dict[str, Any], kind: str) -> str:
    """Of a token, for attention; and what tensor ranks sum where there are some."""
    sums = row[f"{kind}tensor_bytes_per_token"]
    return f"{row[f'{kind}bytes_per_token']:,.0f}" + (f" + {sums:,.0f}" if sums else "")
