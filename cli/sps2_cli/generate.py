"""`sps2 generate`: one prompt streamed to the terminal, or many from a file."""

import asyncio
import json
import sys
from typing import Annotated

import typer

from sps2_cli.batch import run_batch
from sps2_cli.documents import generation_document, usage_line
from sps2_cli.exits import reporting
from sps2_cli.options import DEFAULT_ADDRESS, Json, Server, parse_token_ids
from sps2_cli.prompts import STDIN, Prompt, PromptError, parse_lines, read_text
from sps2_cli.terminal import waiting
from sps2_client import Client, Event, GenerationOptions, Stream, TextDelta, Timeouts


def generate(
    stdin: Annotated[
        str | None, typer.Argument(metavar="[-]", help="`-` reads the prompt from stdin.")
    ] = None,
    server: Server = DEFAULT_ADDRESS,
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    prompt_file: Annotated[str | None, typer.Option(help="File with the prompt; - is stdin.")] = None,
    token_ids: Annotated[str | None, typer.Option(help="The prompt as token ids, as in 5,17,9.")] = None,
    prompts_file: Annotated[
        str | None,
        typer.Option(help="JSON lines: a string, or {prompt | token_ids, max_tokens, ...}; - is stdin."),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once, with --prompts-file.")] = 4,
    max_tokens: Annotated[
        int | None, typer.Option(help="Most tokens to generate.", show_default="256")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", show_default="0")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus mass in (0, 1].", show_default="1")] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Keep the k most likely; 0 is off.", show_default="0")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.", show_default="drawn")] = None,
    stop_token_ids: Annotated[str | None, typer.Option(help="Token ids that end the answer.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end token.")] = False,
    profile: Annotated[
        str,
        typer.Option(help="Attention: exact, paper or default.", show_default="the deployment's"),
    ] = "",
    model: Annotated[str, typer.Option(help="Model name.", show_default="the only one")] = "",
    request_id: Annotated[str | None, typer.Option(help="Name of the request.", show_default="drawn")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for the whole answer.")] = Timeouts().total,
    first_token_timeout: Annotated[float | None, typer.Option(help="Seconds to the first token.")] = None,
    between_tokens_timeout: Annotated[
        float, typer.Option(help="Seconds between tokens.")
    ] = Timeouts().between_tokens or 0.0,
    as_json: Json = False,
) -> None:
    """Generates text and streams it to the terminal.

    For example:

    ```
    sps2 generate --prompt "Once upon a time" --max-tokens 64
    sps2 generate --prompt-file book.txt --temperature 0.8 --seed 7 --json
    cat book.txt | sps2 generate -
    sps2 generate --prompt-file book.txt --profile exact --json
    sps2 generate --prompts-file prompts.jsonl --concurrency 8 > answers.jsonl
    ```
    """
    try:
        options = _options(max_tokens, temperature, top_p, top_k, seed, stop_token_ids, ignore_eos, model)
        options["attention_profile"] = profile
        limits = Timeouts(timeout, first_token_timeout, between_tokens_timeout)
        prompts = _prompts(stdin, prompt, prompt_file, token_ids, prompts_file, options)
    except ValueError as error:  # PromptError, and numbers that are none
        raise typer.BadParameter(str(error)) from error
    if prompts_file is not None:
        if request_id is not None:
            raise typer.BadParameter("--request-id names one request; give it in the lines of --prompts-file")
        raise typer.Exit(asyncio.run(run_batch(server, prompts, limits, concurrency)))
    if request_id is not None:
        options["request_id"] = request_id
    with reporting(as_json=as_json), Client(server) as client:
        only = prompts[0]
        with client.stream(only.text, timeout=limits, **only.options) as stream:
            _print_json(stream) if as_json else _print_text(stream)


def _options(
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
    stop_token_ids: str | None,
    ignore_eos: bool,
    model: str,
) -> GenerationOptions:
    return {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop_token_ids": parse_token_ids(stop_token_ids) if stop_token_ids else [],
        "ignore_eos": ignore_eos,
        "model": model,
    }


def _prompts(
    stdin: str | None,
    prompt: str | None,
    prompt_file: str | None,
    token_ids: str | None,
    prompts_file: str | None,
    options: GenerationOptions,
) -> list[Prompt]:
    """The requests; for a single one the options are those given, not a copy."""
    sources = [one for one in (stdin, prompt, prompt_file, token_ids, prompts_file) if one is not None]
    if len(sources) != 1:
        raise PromptError("give exactly one of --prompt, --prompt-file, --token-ids, --prompts-file and -")
    if stdin not in {None, STDIN}:
        raise PromptError(f"unexpected argument {stdin!r}; a prompt goes behind --prompt")
    if prompts_file is not None:
        return parse_lines(read_text(prompts_file).splitlines(), options)
    if token_ids is not None:
        options["token_ids"] = parse_token_ids(token_ids)
        return [Prompt(None, options)]
    source = stdin or prompt_file
    return [Prompt(prompt if source is None else read_text(source), options)]


def _print_json(stream: Stream) -> None:
    with waiting("waiting for the answer"):
        answer = stream.final()
    sys.stdout.write(json.dumps(generation_document(answer)) + "\n")


def _print_text(stream: Stream) -> None:
    try:
        with waiting("waiting for the first token"):
            _print_delta(next(stream))
        for event in stream:
            _print_delta(event)
    finally:
        if stream.text:
            sys.stdout.write("\n")  # what follows, also an error, starts on its own line
            sys.stdout.flush()
    answer = stream.final()
    sys.stderr.write(f"[{answer.finish_reason}] {usage_line(answer.usage)}\n")


def _print_delta(event: Event) -> None:
    if isinstance(event, TextDelta):
        sys.stdout.write(event.text)
        sys.stdout.flush()
