"""Many generations at once: one JSON line for each as it ends, in the order in which they end."""

import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from sps2_cli.connect import open_async_client
from sps2_cli.documents import generation_document
from sps2_cli.exits import ExitCode, error_document, exit_code
from sps2_cli.prompts import Prompt
from sps2_client import AsyncClient, SPS2Error, Timeouts


async def run_batch(server: str, prompts: Sequence[Prompt], timeout: Timeouts, concurrency: int) -> ExitCode:
    """Runs all prompts, `concurrency` at a time, and prints a document for each, errors included.

    Each document has `index`, the place of its prompt in the file, from 0.

    Returns:
        DONE, or what the first prompt that failed comes to.
    """
    codes: dict[int, ExitCode] = {}
    queue = iter(enumerate(prompts))
    async with open_async_client(server) as client, asyncio.TaskGroup() as tasks:
        for _ in range(min(concurrency, len(prompts))):
            tasks.create_task(_work(client, queue, timeout, codes))
    return codes[min(codes)] if codes else ExitCode.DONE


async def _work(
    client: AsyncClient,
    queue: Iterator[tuple[int, Prompt]],
    timeout: Timeouts,
    codes: dict[int, ExitCode],
) -> None:
    for index, prompt in queue:
        try:
            answer = await client.generate(prompt.text, timeout=timeout, **prompt.options)
        except SPS2Error as error:
            codes[index] = exit_code(error)
            _print({"index": index, **error_document(error)})
        except (ValueError, TypeError) as error:  # a value of the file that no request can carry
            codes[index] = ExitCode.USAGE
            _print({"index": index, "error": {"kind": type(error).__name__, "message": str(error)}})
        else:
            _print({"index": index, **generation_document(answer)})


def _print(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()
