"""`sps2 generate`: one prompt streamed to the terminal, or many from a file."""

import asyncio
import json
import sys
from typing import Annotated

import typer

from sps2_cli.batch import run_batch
from sps2_cli.connect import open_client
from sps2_cli.documents import generation_document, usage_line
from sps2_cli.exits import reporting
from sps2_cli.options import DEFAULT_ADDRESS, Json, Reuse, Server, parse_logit_bias, parse_token_ids
from sps2_cli.prompts import STDIN, Prompt, PromptError, as_chat, parse_lines, read_text
from sps2_cli.terminal import waiting
from sps2_client import Event, GenerationOptions, Stream, TextDelta, Timeouts


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
        typer.Option(
            help="JSON lines: a string, or {prompt | token_ids | messages, max_tokens, ...}; - is stdin."
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message, for the model's chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: the system's message before it.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once, with --prompts-file.")] = 4,
    max_tokens: Annotated[
        int | None, typer.Option(help="Most tokens to generate.", show_default="256")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", show_default="0")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus mass in (0, 1].", show_default="1")] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Keep the k most likely; 0 is off.", show_default="0")
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Drop what is less likely than this fraction of the likeliest.", show_default="0"),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="On tokens of prompt and answer, in [0.01, 100].", show_default="1")
    ] = None,
    presence_penalty: Annotated[
        float | None, typer.Option(help="On tokens that the answer has, in [-2, 2].", show_default="0")
    ] = None,
    frequency_penalty: Annotated[
        float | None, typer.Option(help="The same, for each time it has them.", show_default="0")
    ] = None,
    logit_bias: Annotated[
        str | None, typer.Option(help="Added to logits, in [-100, 100], as in 17=-100,5=2.5.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.", show_default="drawn")] = None,
    first_choice: Annotated[
        int, typer.Option(help="Draw this choice of a request for more than so many.")
    ] = 0,
    n: Annotated[int | None, typer.Option("--n", help="Answers to draw, 1 to 32.", show_default="1")] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(help="With --json: log probabilities, also of so many likeliest tokens, 0 to 20."),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the answer; may be given 16 times.")
    ] = None,
    stop_token_ids: Annotated[str | None, typer.Option(help="Token ids that end the answer.")] = None,
    min_tokens: Annotated[
        int | None,
        typer.Option(help="Least tokens before anything but --max-tokens ends it.", show_default="0"),
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end token.")] = False,
    profile: Annotated[
        str,
        typer.Option(help="Attention: exact, paper or default.", show_default="the deployment's"),
    ] = "",
    priority: Annotated[
        int, typer.Option(help="Urgency, -10 to 10; each step counts as 10 s of waiting.")
    ] = 0,
    prefix_reuse: Annotated[
        Reuse | None,
        typer.Option(
            help="KV of earlier prompts that it may begin with: exact, adopt or off.",
            show_default="adopt under a sparse profile, else exact",
        ),
    ] = None,
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
    sps2 generate --prompt-file book.txt --temperature 0.8 --min-p 0.05 --seed 7 --json
    sps2 generate --prompt "A name for a cat:" --temperature 1 --n 5 --stop "." --max-tokens 16
    cat book.txt | sps2 generate -
    sps2 generate --prompt-file book.txt --profile exact --json
    sps2 generate --chat --system "Be brief." --prompt "What is a cat?"
    sps2 generate --prompts-file prompts.jsonl --concurrency 8 > answers.jsonl
    ```
    """
    try:
        options: GenerationOptions = {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
            "logit_bias": parse_logit_bias(logit_bias) if logit_bias else {},
            "seed": seed,
            "first_choice": first_choice,
            "n": n,
            "logprobs": logprobs,
            "stop": stop or [],
            "stop_token_ids": parse_token_ids(stop_token_ids) if stop_token_ids else [],
            "min_tokens": min_tokens,
            "ignore_eos": ignore_eos,
            "priority": priority,
            "prefix_reuse": prefix_reuse or "",
            "model": model,
            "attention_profile": profile,
        }
        limits = Timeouts(timeout, first_token_timeout, between_tokens_timeout)
        prompts = _prompts(stdin, prompt, prompt_file, token_ids, prompts_file, options)
        if chat or system is not None:
            prompts = [_chat(prompts[0], prompts_file, system, chat=chat)]
    except ValueError as error:  # PromptError, and numbers that are none
        raise typer.BadParameter(str(error)) from error
    if prompts_file is not None:
        if request_id is not None:
            raise typer.BadParameter("--request-id names one request; give it in the lines of --prompts-file")
        raise typer.Exit(asyncio.run(run_batch(server, prompts, limits, concurrency)))
    if request_id is not None:
        options["request_id"] = request_id
    with reporting(as_json=as_json), open_client(server) as client:
        only = prompts[0]
        with client.stream(only.text, timeout=limits, **only.options) as stream:
            _print_answer(stream, as_json=as_json, several=(n or 1) > 1)


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


def _chat(prompt: Prompt, prompts_file: str | None, system: str | None, *, chat: bool) -> Prompt:
    if not chat:
        raise PromptError("--system goes with --chat")
    if prompts_file is not None or prompt.text is None:
        raise PromptError("--chat goes with a prompt that is text; lines of --prompts-file have `messages`")
    prompt.options["messages"] = as_chat(prompt.text, system)
    return Prompt(None, prompt.options)


def _print_answer(stream: Stream, *, as_json: bool, several: bool) -> None:
    if as_json:
        _print_json(stream)
    elif several:
        _print_choices(stream)
    else:
        _print_text(stream)


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


def _print_choices(stream: Stream) -> None:
    """One after the other at the end: as they come they would mix."""
    with waiting("waiting for the answers"):
        answer = stream.final()
    for index, choice in enumerate(answer.choices):
        sys.stdout.write(f"--- {index} [{choice.finish_reason}]\n{choice.text}\n")
    sys.stdout.flush()
    sys.stderr.write(f"{usage_line(answer.usage)}\n")


def _print_delta(event: Event) -> None:
    if isinstance(event, TextDelta):
        sys.stdout.write(event.text)
        sys.stdout.flush()
