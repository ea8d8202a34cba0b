"""Requests whose holders change while they are answered, beside the same ones left alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from sps2_client import Client, Resized, TextDelta
from support.identity import GENERATE_TIMEOUT_S, Prompt
from support.waiting import wait_until

COUNTERS_S = 15.0
"""Counters travel with heartbeats, lease renewals and the router's watch."""


@dataclass(frozen=True)
class ResizedAnswer:
    """What came of a stream, and of each resize."""

    token_ids: tuple[int, ...]
    resizes: tuple[Resized, ...]


def prefill_slices(client: Client) -> int:
    """Slices that prefill ranks have computed since they started, as they last reported."""
    return sum(one.steps_done for one in client.cluster_state().workers if one.role == "prefill")


def answer_resized(
    client: Client, prompt: Prompt, num_tokens: int, plan: Sequence[tuple[int, Sequence[int]]]
) -> ResizedAnswer:
    """Streams a greedy answer; every time so many more tokens have come, the next resize: (degree, ranks)."""
    name, num_seen = f"resized-{len(prompt)}", 0
    resizes: list[Resized] = []
    pause = num_tokens // (len(plan) + 1)
    # Nothing of an earlier prompt is taken over: what this one has prefilled is counted.
    options = {
        "token_ids": prompt,
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "request_id": name,
        "prefix_reuse": "off",
    }
    with client.stream(timeout=GENERATE_TIMEOUT_S, **options) as stream:  # type: ignore[arg-type]
        for event in stream:
            num_seen += len(event.token_ids) if isinstance(event, TextDelta) else 0
            if len(resizes) < len(plan) and num_seen >= pause * (len(resizes) + 1):
                degree, ranks = plan[len(resizes)]
                resizes.append(client.resize(name, degree, ranks=ranks))
        assert len(resizes) == len(plan), "the stream ended before the last resize"
        return ResizedAnswer(stream.final().token_ids, tuple(resizes))


def wait_for_counts(client: Client, num_resizes: int) -> None:
    """Until the state of the cluster tells of so many resizes."""

    def counted() -> int:
        return sum(one.num_resizes for one in client.cluster_state().workers)

    wait_until(lambda: counted() >= num_resizes, COUNTERS_S)
