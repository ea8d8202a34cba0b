"""Calls that come whether or not the ones before are answered, and what became of each."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter

from sps2_client import AsyncClient, SPS2Error, StatusError

SETTLE_S = 30.0
LOOK_S = 0.25


@dataclass(frozen=True)
class Calls:
    """What is asked again and again, each time with other tokens, so that no KV is shared."""

    num_prompt: int
    """Prompt tokens."""
    num_output: int
    """Tokens that each answer has."""
    timeout_s: float
    """The client's deadline."""

    def prompt(self, number: int) -> Sequence[int]:
        """Tokens of one."""
        return random.Random(number).choices(range(10, 250), k=self.num_prompt)


@dataclass
class Outcome:
    """Of all calls of one stretch of time."""

    answered_s: list[float] = field(default_factory=list)
    """Latency of each call that was answered in full."""
    shed_s: list[float] = field(default_factory=list)
    """Of each that was sent away."""
    retry_after_s: list[float] = field(default_factory=list)
    """When those were told to come again."""
    failures: Counter[str] = field(default_factory=Counter)
    """Everything else, by its reason."""
    most_queued: int = 0
    """Most prompt tokens that were seen in the router's queue."""
    seconds: float = 0.0
    """For which calls came."""
    tail_s: float = 0.0
    """From then on until the last had its answer."""

    @property
    def goodput(self) -> float:
        """Calls answered in time, each second in which calls came."""
        return len(self.answered_s) / self.seconds

    @property
    def num_calls(self) -> int:
        """All that came."""
        return len(self.answered_s) + len(self.shed_s) + self.failures.total()

    def __str__(self) -> str:
        shed = (
            f", shed {len(self.shed_s)} (p99 {quantile(self.shed_s, 0.99) * 1e3:.0f} ms)"
            if self.shed_s
            else ""
        )
        return (
            f"{self.num_calls} calls, {self.goodput:.2f}/s answered "
            f"(p50 {quantile(self.answered_s, 0.5):.2f} s, p99 {quantile(self.answered_s, 0.99):.2f} s){shed}, "
            f"failed {dict(self.failures)}, at most {self.most_queued} tokens queued"
        )


def quantile(values: Sequence[float], part: float) -> float:
    """Of at least one value."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


async def ask(client: AsyncClient, calls: Calls, number: int, outcome: Outcome) -> None:
    """One call, noted."""
    began = perf_counter()
    try:
        answer = await client.generate(
            token_ids=calls.prompt(number),
            max_tokens=calls.num_output,
            ignore_eos=True,
            timeout=calls.timeout_s,
        )
    except StatusError as error:
        if error.reason not in {"QUEUE_FULL", "QUEUE_WAIT"}:
            outcome.failures[error.reason] += 1
            return
        outcome.shed_s.append(perf_counter() - began)
        if error.retry_after is not None:
            outcome.retry_after_s.append(error.retry_after)
    except SPS2Error as error:
        outcome.failures[type(error).__name__] += 1
    else:
        assert len(answer.token_ids) == calls.num_output
        outcome.answered_s.append(perf_counter() - began)


async def capacity(client: AsyncClient, calls: Calls, num_clients: int, seconds: float) -> float:
    """Calls answered each second when there are always a few more."""
    outcome, end = Outcome(), perf_counter() + seconds

    async def again(first: int) -> None:
        for number in range(first, 10**6, num_clients):
            if perf_counter() > end:
                return
            await ask(client, calls, number, outcome)

    began = perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for first in range(num_clients):
            tasks.create_task(again(first))
    assert not outcome.failures, outcome.failures
    return len(outcome.answered_s) / (perf_counter() - began)


async def offer(client: AsyncClient, calls: Calls, rate: float, seconds: float, seed: int) -> Outcome:
    """Calls at random times, `rate` each second on average; returns when the last has its answer."""
    outcome, draw = Outcome(seconds=seconds), random.Random(seed)
    async with _watching_queue(client, outcome), asyncio.TaskGroup() as tasks:
        began, at, number = perf_counter(), 0.0, seed * 10_000
        while (at := at + draw.expovariate(rate)) < seconds:
            await asyncio.sleep(max(0.0, began + at - perf_counter()))
            tasks.create_task(ask(client, calls, number := number + 1, outcome))
        await asyncio.sleep(max(0.0, began + seconds - perf_counter()))
    outcome.tail_s = perf_counter() - began - seconds
    return outcome


async def settle(client: AsyncClient) -> None:
    """Returns when the router has nothing to do."""
    async with asyncio.timeout(SETTLE_S):
        while (await client.cluster_state()).num_requests_live:  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(LOOK_S / 10)


@asynccontextmanager
async def _watching_queue(client: AsyncClient, outcome: Outcome) -> AsyncIterator[None]:
    async def watch() -> None:
        while True:
            queued = (await client.cluster_state()).num_queued_tokens
            outcome.most_queued = max(outcome.most_queued, queued)
            await asyncio.sleep(LOOK_S)

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
