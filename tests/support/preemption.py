"""A pool of KV that is too small for all, and streams that a fault cuts: held against their undisturbed runs."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sps2_client import Client
from sps2_layout.profiles import Ladder
from support.csa_oracle import csa_tokens
from support.deployment import DEMO_MODEL, LocalDeployment, deployment
from support.faults import SEEN_BEFORE, Target, Victim, read_tokens
from support.identity import GENERATE_TIMEOUT_S, Tally
from support.oracle import compare
from support.streams import Answered, Asked, ask_together, epochs, wait_for_free_kv

SMALL_PROFILE = {
    "min_shard_tokens": 64,
    "profiles": [{"shards": 4, "levels": [[1, 1], [4, 4]], "tail": 16, "sinks": 4}],
}
"""CSA from 256 tokens on."""


def write_profile(folder: Path) -> Path:
    """The small profile as a file."""
    path = folder / "small.json"
    path.write_text(json.dumps(SMALL_PROFILE), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Crowd:
    """What came of requests that do not fit together."""

    tally: Tally
    num_preemptions: int


@contextmanager
def tight(profile: str, decode: str, kv_tokens: int) -> Iterator[LocalDeployment]:
    """A deployment of the demo model whose ranks have KV for so many tokens each, and check it at every step."""
    arguments = ["--profile", profile, "--kv-tokens", str(kv_tokens), "--threads", "1", "--debug-invariants"]
    with deployment(DEMO_MODEL, "1x2", decode, arguments) as running:
        yield running


def crowd(running: LocalDeployment, client: Client, ladder: Ladder, requests: Sequence[Asked]) -> Crowd:
    """Asks for all at once; each stream must be that of one process without blocks, or of its run alone.

    Raises:
        AssertionError: tokens differ, not first at a near-tie; KV is left behind, or an epoch has ended.
    """
    alone = [_alone(client, ladder, one) for one in requests]
    before, in_epochs = num_preempted(running), epochs(client)
    together = ask_together(client, requests)
    tally = Tally()
    for asked, (tokens, gaps), answered in zip(requests, alone, together, strict=True):
        try:
            tally.add(compare(answered.token_ids, tokens, gaps))
        except AssertionError as error:
            error.add_note(f"prompt of {len(asked.prompt)} tokens, {asked.num_tokens} new, seed {asked.seed}")
            raise
    wait_for_free_kv(client)
    assert epochs(client) == in_epochs, "a rank's KV blocks were not as they must be: see its log"
    return Crowd(tally, num_preempted(running) - before)


def num_preempted(running: LocalDeployment) -> int:
    """Attempts that decode leaders have preempted so far, by their log."""
    return sum(
        line.rpartition("preempted")[2].lstrip('", ').startswith("request_id")
        for line in running.process.lines
    )


def _alone(client: Client, ladder: Ladder, asked: Asked) -> tuple[Sequence[int], Sequence[float]]:
    """Tokens, and the gap at each; of a sampled stream no near-tie is known, so none may flip."""
    if asked.seed is None:
        return csa_tokens(DEMO_MODEL, ladder, asked.prompt, asked.num_tokens)
    answer: Answered = ask_together(client, [asked])[0]
    return answer.token_ids, [float("inf")] * asked.num_tokens


def cut_and_compare(one: Target, client: Client, ladder: Ladder, asked: Asked, victim: Victim) -> Tally:
    """A decode rank's engine dies amid the stream, which goes on token for token.

    Raises:
        AssertionError: tokens differ, and not first at a near-tie.
    """
    tokens, gaps = _alone(client, ladder, asked)
    with client.stream(timeout=GENERATE_TIMEOUT_S, **asked.options) as stream:
        read_tokens(stream, SEEN_BEFORE)
        one.send(victim)
        one.check_live()
        generation = stream.final()
    tally = Tally()
    tally.add(compare(generation.token_ids, tokens, gaps))
    return tally
