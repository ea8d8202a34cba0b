"""`sps2 bench prefill`: options in, rows out."""

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from sps2_bench.csa import SHARD_TOKENS, Choice
from sps2_bench.machine import describe_machine
from sps2_bench.model_choice import chosen_config
from sps2_bench.options import DTYPES, parse_counts, parse_names
from sps2_bench.output import Json, Plots, print_json, print_table, say
from sps2_bench.prefill.cases import (
    BASELINES,
    EXCHANGES,
    PROFILES,
    SPS2,
    Case,
    Row,
    Sample,
    cost_of,
    list_cases,
)
from sps2_bench.prefill.plots import write_plots
from sps2_bench.prefill.random_model import write_random_model
from sps2_bench.prefill.run import run_cases
from sps2_bench.prefill.timelines import write_timeline
from sps2_bench.processes import WorkerError, available_cpus
from sps2_engine.models import ModelConfig

LONG = 64 * 1024
"""From this length on one run is enough: it takes minutes."""


def prefill(
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, such as 2k,32k.")] = "2k,8k,32k",
    profiles: Annotated[str, typer.Option(help=f"Among {', '.join(PROFILES)}.")] = "exact,paper,default",
    ranks: Annotated[str, typer.Option(help="SP degrees; the cores are dealt among the ranks.")] = "1,2",
    dtypes: Annotated[str, typer.Option(help="fp32, bf16 or both; transformers runs in fp32.")] = "fp32",
    exchange: Annotated[str, typer.Option(help=f"One of {', '.join(EXCHANGES)}.")] = "auto",
    repeat: Annotated[int, typer.Option(min=1, help="Runs of a case; from 64k tokens on it is one.")] = 3,
    baselines: Annotated[str, typer.Option(help="transformers, or nothing.")] = "",
    random_model: Annotated[str, typer.Option(metavar="KEY=N,...", help="Sizes of the random model.")] = "",
    model: Annotated[Path | None, typer.Option(help="A checkpoint folder instead.", exists=True)] = None,
    shard_tokens: Annotated[int, typer.Option(min=1, help="Fewest tokens of a shard.")] = SHARD_TOKENS,
    as_json: Json = False,
    plots: Plots = None,
    timeline: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Run each case once more and write what ranks did when.", file_okay=False
        ),
    ] = None,
) -> None:
    """Time to first token over prompt length x profile x ranks, beside exact attention and transformers.

    Medians of --repeat runs; what compiles or initialises itself lazily has done so before. With --plots the folder
    also gets the rows, prefill.json; with --timeline a Chrome trace and a PNG of it for each case.

    For example:

    ```
    sps2 bench prefill --lengths 16k,32k --dtypes fp32,bf16 --baselines transformers --plots out
    sps2 bench prefill --lengths 32k --profiles default --ranks 2 --repeat 1 --timeline out
    sps2 bench prefill --lengths 256k --profiles default --random-model hidden=256,layers=4,intermediate=704
    ```
    """
    cases = list(
        list_cases(
            parse_counts(lengths),
            parse_names(profiles, PROFILES),
            parse_counts(ranks),
            parse_names(dtypes, DTYPES),
            parse_names(baselines, BASELINES) if baselines else (),
            _exchange(exchange),
        )
    )
    config = chosen_config(model, random_model)
    _refuse_impossible(cases, config, shard_tokens)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder = model or write_random_model(config, Path(scratch))
            measured = run_cases(
                cases,
                folder,
                available_cpus(),
                shard_tokens,
                lambda length: _repeats(length, repeat),
                _Progress(sum(_repeats(case.length, repeat) for case in cases)),
                lambda case: timeline is not None and case.engine.program == SPS2,
            )
    except WorkerError as error:
        say(f"sps2 bench prefill: {error}")
        raise typer.Exit(1) from error
    rows = [
        Row(
            case,
            cost_of(case, config, shard_tokens, measured.threads[case.engine]),
            tuple(measured.samples[case]),
            measured.threads[case.engine],
            measured.rates[case.engine],
        )
        for case in cases
    ]
    drawn = [
        path
        for case, traces in measured.traces.items()
        if timeline
        for path in write_timeline(case, traces, timeline)
    ]
    _report([row.document(rows) for row in rows], as_json, plots, drawn)


def _exchange(text: str) -> Choice:
    for name in EXCHANGES:
        if name == text:
            return name
    raise typer.BadParameter(f"{text!r} is none of {', '.join(EXCHANGES)}")


def _refuse_impossible(cases: list[Case], config: ModelConfig, shard_tokens: int) -> None:
    """Before any process is started."""
    cores = len(available_cpus())
    for case in cases:
        if case.engine.ranks > cores:
            raise typer.BadParameter(f"{case.engine.ranks} ranks want as many cores; there are {cores}")
        if case.length > config.max_position:
            raise typer.BadParameter(f"{case.length} tokens are more than the model's {config.max_position}")
        try:
            cost_of(case, config, shard_tokens)
        except ValueError as error:
            raise typer.BadParameter(f"{case.length} tokens, {case.profile}: {error}") from error


def _repeats(length: int, repeat: int) -> int:
    return 1 if length >= LONG else repeat


class _Progress:
    """Says what has been run."""

    def __init__(self, num_runs: int) -> None:
        self._num_runs = num_runs
        self._done = 0
        say(f"{num_runs} runs; the first of each engine, which warms it up, comes before them")

    def __call__(self, case: Case, sample: Sample) -> None:
        self._done += 1
        engine = case.engine
        say(
            f"{self._done} of {self._num_runs}: {case.length} tokens, {engine.program} {engine.dtype} {case.profile} "
            f"on {engine.ranks}: {sample.seconds:.3f} s"
        )


def _report(rows: list[dict[str, Any]], as_json: bool, plots: Path | None, written: list[Path]) -> None:
    machine = describe_machine()
    document = {"machine": machine, "rows": rows}
    if plots:
        written = [*write_plots(rows, plots), plots / "prefill.json", *written]
        (plots / "prefill.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    if as_json:
        print_json({**document, "plots": [str(path) for path in written]})
        return
    columns = ("tokens", "program", "dtype", "profile", "ranks", "ttft s", "over transformers", "speed-up",
               "floor", "TFLOP", "MB moved", "exposed s", "peak MiB")  # fmt: skip
    print_table(columns, [_cells(row) for row in rows])
    say(f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, {machine['date']}")
    for path in written:
        say(f"wrote {path}")


def _cells(row: dict[str, Any]) -> list[str]:
    keys = ("over_transformers", "speedup", "floor_speedup")
    over, ratio, floor = (f"{row[key]:.2f}" if row[key] else "" for key in keys)
    return [
        f"{row['length']:,}",
        row["program"],
        row["dtype"],
        row["profile"],
        f"{row['ranks']}x{row['threads']}",
        f"{row['ttft_s']:.3f}",
        over,
        ratio,
        floor,
        f"{row['flops'] / 1e12:.3f}",
        f"{row['bytes'] / 1e6:.1f}",
        f"{row['exposed_s']:.3f}",
        f"{row['peak_rss'] / 2**20:.0f}",
    ]
