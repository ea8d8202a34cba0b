"""Many requests at once, and the same ones alone."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier
from time import monotonic

from sps2_client import Client, GenerationOptions, TextDelta, Usage
from support.identity import GENERATE_TIMEOUT_S, Prompt, Tally, book_ids, reference
from support.oracle import compare
from support.waiting import wait_until

START_TIMEOUT_S = 30.0
FREE_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Asked:
    """One request."""

    prompt: Prompt
    num_tokens: int
    seed: int | None
    """Of its sampling; None is greedy."""
    num_choices: int = 1

    @property
    def options(self) -> GenerationOptions:
        """Keyword arguments of `Client.stream`."""
        options: GenerationOptions = {
            "token_ids": self.prompt,
            "max_tokens": self.num_tokens,
            "ignore_eos": True,
            "prefix_reuse": "off",  # asked for again and again, it is to be prefilled again under its own mask
        }
        if self.seed is not None:
            options |= {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": self.seed}
        if self.num_choices > 1:
            options["n"] = self.num_choices
        return options


@dataclass(frozen=True)
class Answered:
    """Its tokens, and when they came."""

    token_ids: tuple[int, ...]
    began: float
    ended: float
    usage: Usage


def mixed_requests(lengths: Sequence[int], least_tokens: int = 16) -> list[Asked]:
    """Requests with prompts of these lengths from different places of the demo model's book, which starts again.

    Every second one is sampled with a seed of its own; each generates a few tokens more than the one before.
    """
    text = book_ids() * (2 + max(lengths) // len(book_ids()))
    return [
        Asked(text[start : start + length], least_tokens + 5 * index, index if index % 2 else None)
        for index, (start, length) in enumerate(zip(range(0, len(book_ids()), 7), lengths, strict=False))
    ]


def ask(client: Client, asked: Asked) -> Answered:
    """Streams one request to its end."""
    began = 0.0
    with client.stream(timeout=GENERATE_TIMEOUT_S, **asked.options) as stream:
        for event in stream:
            if isinstance(event, TextDelta):
                began = began or monotonic()
        final = stream.final()
        return Answered(final.token_ids, began, monotonic(), final.usage)


def ask_together(client: Client, requests: Sequence[Asked]) -> list[Answered]:
    """All of them at once, each on a thread of its own."""
    barrier = Barrier(len(requests), timeout=START_TIMEOUT_S)

    def on_thread(asked: Asked) -> Answered:
        barrier.wait()
        return ask(client, asked)

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(on_thread, requests))


def most_at_once(answers: Sequence[Answered]) -> int:
    """The largest number of streams that were between their first and their last token at one time."""
    return max(sum(other.began <= one.began < other.ended for other in answers) for one in answers)


def check_same(
    folder: Path, requests: Sequence[Asked], alone: Sequence[Answered], together: Sequence[Answered]
) -> Tally:
    """Each stream's tokens are those that it gets alone.

    The batch it is in may round a near-tie the other way (decode.md): a greedy stream may differ there, as
    the oracle's logits tell. A sampled one may not differ at all.
    """
    tally = Tally()
    for asked, one, other in zip(requests, alone, together, strict=True):
        where = f"prompt of {len(asked.prompt)} tokens, {asked.num_tokens} new, seed {asked.seed}"
        assert len(one.token_ids) == asked.num_tokens, where
        gaps = [float("inf")] * asked.num_tokens
        if one.token_ids != other.token_ids and asked.seed is None:
            expected, gaps = reference(folder, asked.prompt, asked.num_tokens)
            assert list(one.token_ids) == expected, f"alone it flipped already: {where}"
        try:
            tally.add(compare(other.token_ids, one.token_ids, gaps))
        except AssertionError as error:
            error.add_note(where)
            raise
    return tally


def epochs(client: Client) -> dict[str, int]:
    """The epoch of each rank. Where it stays the same with --debug-invariants, no rank has found anything wrong."""
    return {worker.worker_id: worker.epoch for worker in client.cluster_state().workers}


def wait_for_free_kv(client: Client) -> None:
    """Waits until no rank holds a KV block any more, nor the router a request."""

    def free() -> bool:
        state = client.cluster_state()
        return state.num_requests_live == 0 and not any(one.kv_blocks_used for one in state.workers)

    try:
        wait_until(free, FREE_TIMEOUT_S)
    except TimeoutError:
        used = {one.worker_id: one.kv_blocks_used for one in client.cluster_state().workers}
        raise AssertionError(f"KV blocks still used after {FREE_TIMEOUT_S:g} s: {used}") from None
