"""`sps2 eval accuracy`: options in, the curve and the default out."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Annotated, Any

import torch
import typer

from sps2_bench.accuracy.candidates import EXACT, MIN_SHARDS, Candidate, catalogue, choose
from sps2_bench.accuracy.plots import write_plots
from sps2_bench.accuracy.prompts import Recipe
from sps2_bench.accuracy.report import COLUMNS, markdown, table_rows, verdict
from sps2_bench.accuracy.results import Cost, ProfileResult, choose_default, summarise
from sps2_bench.accuracy.worker import prompt_maker
from sps2_bench.csa import attention_cost, make_plan
from sps2_bench.machine import describe_machine
from sps2_bench.options import parse_counts, split_list
from sps2_bench.output import Json, Plots, print_json, print_table, say
from sps2_bench.processes import Message, Worker, WorkerError, available_cpus
from sps2_engine.models import CheckpointError, ModelConfig, read_model_config

PROMPT_TIMEOUT_S = 3_600.0
"""Longest time for one prompt under all profiles."""
CHECKOUT = Path(__file__).resolve().parents[3]
ALL = "all"


def accuracy(
    model: Annotated[Path, typer.Option(help="Model folder with facts.json.")] = CHECKOUT / "models/demo",
    text: Annotated[
        Path | None,
        typer.Option(help="Prose: a file, or a folder of .txt files.", show_default="the model's prompt.txt"),
    ] = None,
    profiles: Annotated[
        str, typer.Option(help="Names and .json files (docs/profiles.md), or all; local-only ones are added.")
    ] = ALL,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens scored, at least.")] = 200_000,
    lengths: Annotated[str, typer.Option(help="Prompt lengths; they take turns.")] = "4k,6k,8k",
    continuation: Annotated[int, typer.Option(min=1, help="Tokens scored after each prompt.")] = 1024,
    shards: Annotated[int, typer.Option(min=MIN_SHARDS, help="Shards of every prompt.")] = 8,
    tail: Annotated[int, typer.Option(min=0, help="Last tokens that see everything.")] = 64,
    facts: Annotated[int, typer.Option(min=1, help="One-hop questions a prompt; half as many chains.")] = 8,
    seed: Annotated[int, typer.Option(help="Of facts, places and resampling.")] = 0,
    as_json: Json = False,
    plots: Plots = None,
) -> None:
    """What each CSA profile loses against dense prefill, and the default by its rule.

    With --plots the folder also gets the report, accuracy.md and accuracy.json.

    For example:

    ```
    sps2 eval accuracy --text /data/books --plots out
    sps2 eval accuracy --profiles paper,dense-8,mine.json --tokens 2000 --lengths 1k --continuation 256
    ```
    """
    text = text or model / "prompt.txt"
    recipe = Recipe(
        lengths=parse_counts(lengths),
        num_shards=shards,
        continuation=continuation,
        num_facts=facts,
        num_prompts=-(-tokens // continuation),
        tail=tail,
        seed=seed,
    )
    names, candidates = _candidates(recipe, profiles)
    config = _check(model, text, recipe)
    settings = {"model": str(model), "text": str(text), "recipe": asdict(recipe), "profiles": names}
    try:
        answers = _ask(settings, recipe.num_prompts)
    except WorkerError as error:
        say(f"sps2 eval accuracy: {error}")
        raise typer.Exit(1) from error
    results = summarise(answers, candidates, _costs(candidates, config, recipe), seed)
    _report(results, _document(results, answers, settings), as_json, plots)


def _candidates(recipe: Recipe, profiles: str) -> tuple[list[str], list[Candidate]]:
    try:
        names = list(catalogue(recipe.num_shards, recipe.tail)) if profiles == ALL else split_list(profiles)
        return names, choose(names, recipe.lengths, recipe.num_shards, recipe.tail)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _check(model: Path, text: Path, recipe: Recipe) -> ModelConfig:
    """Finds what cannot work before any worker starts: makes one prompt of each length."""
    try:
        config = read_model_config(model)
        maker = prompt_maker(model, text, recipe, config.bos_id)
        for number in range(min(len(recipe.lengths), recipe.num_prompts)):
            maker.make(number)
    except (CheckpointError, OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    if max(recipe.lengths) + recipe.continuation > config.max_position:
        raise typer.BadParameter(f"longer than the model's {config.max_position} tokens")
    return config


def _ask(settings: Message, num_prompts: int) -> list[Message]:
    """The workers' answers by prompt: a worker on each core takes the next prompt when it is free."""
    remaining, done, lock = iter(range(num_prompts)), 0, Lock()

    def numbers() -> Iterator[int]:
        while True:
            with lock:
                number = next(remaining, None)
            if number is None:
                return
            yield number

    def work(worker: Worker) -> list[Message]:
        nonlocal done
        answers = []
        for number in numbers():
            worker.ask({"prompt": number})
            answers.append(worker.answer(PROMPT_TIMEOUT_S))
            with lock:
                done += 1
                say(f"{done} of {num_prompts} prompts")
        return answers

    with ExitStack() as stack:
        workers = [
            stack.enter_context(Worker("sps2_bench.accuracy.worker", settings, [cpu]))
            for cpu in available_cpus()[:num_prompts]
        ]
        with ThreadPoolExecutor(len(workers)) as pool:
            answers = [answer for part in pool.map(work, workers) for answer in part]
    return sorted(answers, key=lambda answer: int(answer["prompt"]))


def _costs(candidates: list[Candidate], config: ModelConfig, recipe: Recipe) -> dict[str, Cost]:
    """At the longest prompt, a rank for each shard, fp32."""
    longest = max(recipe.lengths)
    costs = {}
    for one in candidates:
        layout = one.layout(longest, recipe.num_shards)
        plan = make_plan(layout, recipe.num_shards, config, torch.float32)
        costs[one.name] = Cost(*attention_cost(plan, config.num_layers))
    return costs


def _document(results: list[ProfileResult], answers: list[Message], settings: Message) -> dict[str, Any]:
    exact = [answer["scores"][EXACT] for answer in answers]
    questions = [question["hops"] for answer in answers for question in answer["questions"]]
    return {
        "machine": describe_machine(),
        "settings": settings,
        "prompts": len(answers),
        "scored_tokens": sum(score["tokens"] for score in exact),
        "questions": {"one_hop": questions.count(1), "two_hops": questions.count(2)},
        "repeats": sum(score["repeats"] for score in exact),
        "default": choose_default(results),
        "profiles": [one.document() for one in results],
    }


def _report(
    results: list[ProfileResult], document: dict[str, Any], as_json: bool, plots: Path | None
) -> None:
    written: list[Path] = []
    if plots:
        written = write_plots(results, document["default"], plots)
        head = {name: value for name, value in document.items() if name not in {"profiles", "default"}}
        page = markdown(results, document["default"], head, [path.name for path in written])
        written += [plots / "accuracy.md", plots / "accuracy.json"]
        written[-2].write_text(page, encoding="utf-8")
        written[-1].write_text(json.dumps(document, indent=1), encoding="utf-8")
    if as_json:
        print_json({**document, "plots": [str(path) for path in written]})
        return
    print_table(COLUMNS, table_rows(results))
    say(verdict(document["default"]))
    say(f"{document['scored_tokens']:,} scored tokens, questions {document['questions']}")
    for path in written:
        say(f"wrote {path}")
