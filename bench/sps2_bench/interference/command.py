"""`sps2 bench interference`: options in, rows out."""

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from sps2_bench.deployment import write_word_tokenizer
from sps2_bench.interference.load import Load
from sps2_bench.interference.plots import write_plots
from sps2_bench.interference.run import Setup, list_cases, run_rounds
from sps2_bench.interference.window import MEASURES, Case, Rounds, Window, beyond_control, document
from sps2_bench.machine import describe_machine
from sps2_bench.model_choice import chosen_config
from sps2_bench.options import parse_counts
from sps2_bench.output import Json, Plots, print_json, print_table, say
from sps2_bench.prefill.random_model import write_random_model
from sps2_bench.processes import WorkerError, available_cpus
from sps2_client import SPS2Error

PROFILES = ("exact", "paper", "default")


def interference(
    batch: Annotated[int, typer.Option(min=1, help="Requests that decode.")] = 4,
    context: Annotated[str, typer.Option(help="Tokens of their prompts.")] = "2k",
    long: Annotated[str, typer.Option(help="Tokens of the prompt that arrives.")] = "32k",
    profile: Annotated[
        str, typer.Option(help=f"Its attention on the pools: {', '.join(PROFILES)}.")
    ] = "default",
    chunks: Annotated[str, typer.Option(help="Most tokens of a step of the baseline.")] = "512,2k",
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each case.")] = 3,
    control_mib: Annotated[
        int, typer.Option(min=64, help="MiB that the control reads over and over.")
    ] = 1024,
    random_model: Annotated[str, typer.Option(metavar="KEY=N,...", help="Sizes of the random model.")] = "",
    as_json: Json = False,
    plots: Plots = None,
) -> None:
    """Time between tokens of running decodes while a long prompt arrives: pools apart, and together.

    A real deployment, its prefill pool pinned to one half of the cores and its decode pool to the other; router,
    directory, Redis and this command run beside the prefill pool. TBT is taken where the client sees tokens come.
    "quiet": nothing else happens; "control": an unrelated process on the prefill pool's cores reads memory without end;
    "prefill": the long prompt is prefilled and its KV delivered. Beside it the baseline with the same load: sarathi,
    chunked prefill and decodes in one process with all cores, dense attention. Cases take turns, --rounds times.

    For example:

    ```
    sps2 bench interference --plots out
    sps2 bench interference --profile exact --chunks 512 --rounds 1
    ```
    """
    load = Load(batch, _one_count(context), _one_count(long), _known(profile))
    cpus = available_cpus()
    if len(cpus) < 2:
        raise typer.BadParameter("two pools want two cores")
    half = len(cpus) // 2
    config = chosen_config(None, random_model)
    cases = list_cases(parse_counts(chunks))
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder = write_random_model(config, Path(scratch))
            write_word_tokenizer(folder, config.vocab_size)
            setup = Setup(folder, config.vocab_size, cpus[:half], cpus[half:], control_mib)
            measured = run_rounds(setup, load, cases, rounds, _progress)
    except (WorkerError, SPS2Error) as error:
        say(f"sps2 bench interference: {error}")
        raise typer.Exit(1) from error
    _report(load, cases, measured, as_json, plots)


def _one_count(text: str) -> int:
    counts = parse_counts(text)
    if len(counts) != 1:
        raise typer.BadParameter(f"{text!r} is more than one number")
    return counts[0]


def _known(profile: str) -> str:
    if profile not in PROFILES:
        raise typer.BadParameter(f"{profile!r} is none of {', '.join(PROFILES)}")
    return profile


def _progress(number: int, case: Case, window: Window) -> None:
    measures = window.measures()
    first = f", first token after {window.ttft_s:.2f} s" if window.ttft_s is not None else ""
    say(
        f"round {number + 1}: {case.name} {case.disturbance}: {len(window.gaps())} gaps, "
        f"median {measures['p50'] * 1e3:.1f} ms, p99 {measures['p99'] * 1e3:.1f} ms{first}"
    )


def _report(load: Load, cases: list[Case], measured: Rounds, as_json: bool, plots: Path | None) -> None:
    machine = describe_machine()
    rows = [document(measured, case) for case in cases]
    beyond = {name: beyond_control(measured, name) for name in MEASURES}
    found = {"machine": machine, "load": vars(load), "rows": rows, "beyond_control": beyond}
    written: list[Path] = []
    if plots:
        written = [*write_plots(measured[-1], rows, plots), plots / "interference.json"]
        written[-1].write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print_json({**found, "plots": [str(path) for path in written]})
        return
    columns = ("program", "disturbance", "gaps", *(f"TBT {name} ms" for name in MEASURES),
               "raised p50", "raised mean", "raised p99", "TTFT s")  # fmt: skip
    print_table(columns, [_cells(row) for row in rows])
    shown = ", ".join(f"{name} {value:+.1%}" for name, value in beyond.items())
    say(f"prefill raises the time between tokens beyond the control by: {shown}")
    say(f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, {machine['date']}")
    for path in written:
        say(f"wrote {path}")


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['program']} {row['chunk'] or ''}".strip(),
        row["disturbance"],
        f"{row['num_gaps']:,}",
        *(f"{row[f'tbt_{name}_s'] * 1e3:.1f}" for name in MEASURES),
        *(f"{row[f'raise_{name}']:+.1%}" for name in ("p50", "mean", "p99")),
        f"{row['ttft_s']:.2f}" if row["ttft_s"] is not None else "",
    ]
