"""The load on a deployment, through its client: decodes that run, and what happens to them meanwhile."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Self

from sps2_bench.interference.load import MAX_TOKENS, STEADY_TOKENS, Arrivals
from sps2_bench.interference.window import Window
from sps2_bench.processes import WorkerError
from sps2_client import AsyncClient, TextDelta

IDLE_POLL_S = 0.1
IDLE_TIMEOUT_S = 60.0


class Decodes:
    """Requests that decode while this is entered; notes when their tokens come, and cancels them in the end."""

    def __init__(self, client: AsyncClient, prompts: Sequence[list[int]]) -> None:
        self._client = client
        self._prompts = prompts
        self.arrivals = Arrivals(len(prompts))
        self._arrived = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        for row, prompt in enumerate(self._prompts):
            task = asyncio.create_task(self._read(row, prompt))
            task.add_done_callback(lambda _task: self._arrived.set())
            self._tasks.append(task)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    async def _read(self, row: int, prompt: list[int]) -> None:
        async with self._client.stream(token_ids=prompt, max_tokens=MAX_TOKENS, ignore_eos=True) as stream:
            async for event in stream:
                if isinstance(event, TextDelta):
                    self.arrivals.add(row, time.perf_counter(), len(event.token_ids))
                    self._arrived.set()

    async def advance(self, num_tokens: int) -> None:
        """Waits until every decode has so many tokens more than the slowest has now.

        Raises:
            SPS2Error: a decode failed.
            WorkerError: one ended, which has tokens to go.
        """
        goal = self.arrivals.fewest + num_tokens
        while self.arrivals.fewest < goal:
            self._arrived.clear()
            await self._arrived.wait()
            for task in self._tasks:
                if task.done():
                    task.result()
                    raise WorkerError(f"a decode ended with fewer than {MAX_TOKENS} tokens")


Disturb = Callable[[AsyncClient, Decodes], Awaitable[float | None]]
"""What happens within the span, from its begin to its end; returns a time to first token, if there is one."""


async def run_window(address: str, prompts: Sequence[list[int]], disturb: Disturb) -> Window:
    """Fresh decodes, the disturbance, and a while after it; then waits until the deployment is idle.

    Raises:
        SPS2Error: a request failed.
        WorkerError: the deployment did not become idle.
    """
    async with AsyncClient(address) as client:
        async with Decodes(client, prompts) as decodes:
            await decodes.advance(STEADY_TOKENS)
            begin = time.perf_counter()
            ttft_s = await disturb(client, decodes)
            end = time.perf_counter()
            await decodes.advance(STEADY_TOKENS)
        await _wait_until_idle(client)
        return Window(decodes.arrivals.rows(), begin, end, ttft_s)


async def _wait_until_idle(client: AsyncClient) -> None:
    deadline = time.monotonic() + IDLE_TIMEOUT_S
    while True:
        state = await client.cluster_state()
        if not (state.num_requests_live or any(worker.kv_blocks_used for worker in state.workers)):
            return
        if time.monotonic() > deadline:
            raise WorkerError(f"the deployment still holds KV {IDLE_TIMEOUT_S:g} s after its last request")
        await asyncio.sleep(IDLE_POLL_S)


async def answer_prompt(client: AsyncClient, token_ids: list[int], profile: str) -> float:
    """Sends a prompt and returns the time to its first token.

    It asks for a second one: for a single token no KV would be delivered.
    """
    sent = time.perf_counter()
    async with client.stream(
        token_ids=token_ids, max_tokens=2, ignore_eos=True, attention_profile=profile, prefix_reuse="off"
    ) as stream:
        async for event in stream:
            if isinstance(event, TextDelta):
                return time.perf_counter() - sent
    raise AssertionError("a stream that ends without an error has tokens")
