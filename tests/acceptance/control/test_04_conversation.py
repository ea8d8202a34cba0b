"""Must show 4: a ten-turn conversation about a document computes what is new, and loses nothing by it."""

import json
import re
from collections.abc import Sequence
from math import exp, log
from pathlib import Path
from random import Random
from statistics import mean, stdev

import pytest
from tokenizers import Tokenizer

from sps2_bench.accuracy.worker import read_text
from sps2_client import Client, Generation
from sps2_layout.attention import Attention
from sps2_layout.block_hash import BLOCK_TOKENS
from sps2_layout.profile_file import parse_profile
from sps2_layout.profiles import EXACT, STRIDE, Ladder
from support.conversations import Conversation, Told, tell
from support.csa_oracle import csa_logprobs, csa_tokens, long_prompts
from support.deployment import DEMO_MODEL, deployment
from support.held_out import write_held_out
from support.identity import Tally
from support.must_show import MustShow
from support.oracle import compare

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(1800)]

NUM_TOKENS, NUM_TURNS, NUM_MORE = 6_000, 10, 4
WORSE = 1.02
"""Perplexity with reuse is at most so many times that without."""
SAME = 2e-3
"""Log probabilities of a deployment differ from those of one process by less."""
NUM_PAGES, QUESTION_TOKENS = 48, 5
NUM_PARTING = 24
PAPER = {"min_shard_tokens": 128, "profiles": [{"shards": 8, "levels": [[1, 1], [8, 8]]}]}
DEFAULT = {"min_shard_tokens": 128, "profiles": [{"shards": 8, "levels": [[1, 1], [8, 8]], "tail": 64}]}
"""The named profiles; at their own threshold a document of 6,000 tokens is attended exactly."""


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("profile", [None, PAPER, DEFAULT], ids=["exact", "paper", "default"])
def test_ten_turns(must_show: MustShow, tmp_path: Path, profile: object, num_ranks: int) -> None:
    name, file = "exact" if profile is None else "", tmp_path / "profile.json"
    file.write_text(json.dumps(profile or DEFAULT), encoding="utf-8")
    conversation = Conversation.of(DEMO_MODEL, NUM_TOKENS, NUM_TURNS, NUM_MORE)
    shown = "exact" if profile is None else "paper" if profile is PAPER else "default"
    with (
        must_show(f"4 ten turns on {NUM_TOKENS:,} tokens, {shown}, prefill 1x{num_ranks}") as figures,
        deployment(prefill=f"1x{num_ranks}", decode="1x1", arguments=["--profile", str(file)]) as running,
        running.client() as client,
    ):
        without = tell(client, conversation, name, "off")
        reused = tell(client, conversation, name, "")
        reused.check_only_new_is_computed()
        cached = sum(one.usage.cached_tokens for one in reused.answers[1:])
        asked = sum(one.usage.prompt_tokens for one in reused.answers[1:])
        figures.append(f"{cached / asked:.1%} of later prompts cached")
        figures.append(f"TTFT {reused.later_ttft_s / without.later_ttft_s:.2f}x of that without")
        figures.append(f"perplexity {reused.perplexity:.3f}, without {without.perplexity:.3f}")
        figures.append(f"found {sum(reused.found)} of {NUM_TURNS} facts, without {sum(without.found)}")
        if profile is None:
            tally = Tally()
            for prompt, one, other in zip(reused.prompts, reused.answers, without.answers, strict=True):
                gaps = [float("inf")] * len(one.token_ids)
                if one.token_ids != other.token_ids:
                    gaps = csa_tokens(DEMO_MODEL, EXACT, prompt, len(one.token_ids))[1]
                tally.add(compare(one.token_ids, other.token_ids, gaps))
            tally.check()
        else:
            check_logprobs(parse_profile("", json.dumps(profile)), conversation, reused, without)
        assert reused.perplexity <= WORSE * without.perplexity
        assert sum(reused.found) >= sum(without.found)


def check_logprobs(ladder: Ladder, conversation: Conversation, reused: Told, without: Told) -> None:
    """Both ways score each token as one process does: with the first prompt's mask over the document, then dense
    queries; and each time with a mask of its own."""
    text = [*conversation.document, *(token for turn in conversation.turns for token in turn.more)]
    num_kept, num_more = len(conversation.document) // BLOCK_TOKENS * BLOCK_TOKENS, len(reused.logprobs)
    kept = Attention.admit(ladder, len(reused.prompts[0])).adopting(num_kept)
    assert reused.logprobs == pytest.approx(csa_logprobs(DEMO_MODEL, kept, text, num_more), abs=SAME)
    alone = [
        csa_logprobs(DEMO_MODEL, Attention.admit(ladder, end), text[: end + 1], 1)[0]
        for end in range(len(conversation.document), len(text))
    ]
    assert without.logprobs == pytest.approx(alone, abs=SAME)


@pytest.mark.parametrize("profile", [None, DEFAULT], ids=["exact", "default"])
def test_prompts_part_from_kept_ones(must_show: MustShow, tmp_path: Path, profile: object) -> None:
    """Each begins as one before it, up to anywhere, and goes on differently, further or less far."""
    name, file = "exact" if profile is None else "", tmp_path / "profile.json"
    file.write_text(json.dumps(profile or DEFAULT), encoding="utf-8")
    ladder = EXACT if profile is None else parse_profile("", json.dumps(profile))
    rng = Random(0)
    book = long_prompts([NUM_TOKENS])[0]
    asked: list[Sequence[int]] = []
    num_cached, num_adopted = 0, 0
    with (
        must_show(
            f"4 {NUM_PARTING} prompts that part from kept ones, {name or 'default'}, 1x2 to 1x2"
        ) as figures,
        deployment(arguments=["--profile", str(file)]) as running,
        running.client() as client,
    ):
        for number in range(NUM_PARTING):
            num_shared = rng.randrange(BLOCK_TOKENS, NUM_TOKENS - BLOCK_TOKENS) if number else NUM_TOKENS
            num_more = rng.randrange(50, 51 + num_shared // 3) if number else 0
            prompt = [*book[:num_shared], *rng.sample(book, num_more)]
            answer = ask_scored(client, prompt, name)
            asked.append(prompt)
            masks = resolved(answer.usage.attention_profile, ladder, asked)
            num_cached += answer.usage.cached_tokens > 0
            num_adopted += answer.usage.attention_profile.startswith("adopted")
            text, found = [*prompt, *answer.token_ids], [one.logprob for one in answer.logprobs]
            assert any(
                found == pytest.approx(csa_logprobs(DEMO_MODEL, mask, text, len(found)), abs=SAME)
                for mask in masks
            ), f"prompt {number} of {len(prompt)} tokens, {num_shared} of them shared"
        figures.append(
            f"{num_cached} began with kept KV, {num_adopted} adopted its mask; log probabilities right"
        )
        assert num_cached > NUM_PARTING / 2


def resolved(shown: str, ladder: Ladder, asked: Sequence[Sequence[int]]) -> list[Attention]:
    """The attention that usage shows for the last prompt: its own, or that of one which began like it."""
    adopted = re.search(r"^adopted: (.*) for (\d+) tokens, then dense", shown)
    if adopted is None:
        return [Attention.admit(ladder, len(asked[-1]))]
    own, num_tokens = asked[-1], int(adopted[2])
    lengths = {len(one) for one in asked[:-1] if one[:num_tokens] == own[:num_tokens]}
    masks = [Attention.admit(ladder, length) for length in lengths if length >= num_tokens]
    return [one.adopting(num_tokens) for one in masks if one.describe() == adopted[1]]


def ask_scored(client: Client, prompt: Sequence[int], profile: str) -> Generation:
    """A few greedy tokens with their log probabilities."""
    return client.generate(
        token_ids=prompt, max_tokens=8, ignore_eos=True, logprobs=0, attention_profile=profile, timeout=120
    )


def test_perplexity_of_many_pages(must_show: MustShow, tmp_path: Path, repo_root: Path) -> None:
    """What follows a kept document is predicted no worse than by a mask of its own, and as by exact attention.

    A conversation scores few tokens; these are enough for an interval.
    """
    ladder = parse_profile("paper", json.dumps(PAPER))
    # Without a tail the mask is the same for so many lengths of a prompt, so that one pass scores as many.
    same = ladder.rungs[0].num_shards * STRIDE
    num_kept = NUM_TOKENS // same * same
    near = num_kept // ladder.rungs[0].num_shards
    ways = {
        "reuse": (Attention.admit(ladder, num_kept + QUESTION_TOKENS).adopting(num_kept), 0),
        "exact": (Attention.admit(EXACT, num_kept + same), 0),
        "own mask": (Attention.admit(ladder, num_kept + same), 0),
        f"behind the last {near} alone": (Attention.admit(EXACT, near + same), num_kept - near),
    }
    with must_show(f"4 perplexity behind {num_kept:,} kept tokens, paper, {NUM_PAGES} pages") as figures:
        logprobs: dict[str, list[float]] = {name: [] for name in ways}
        for page in pages(write_held_out(repo_root, tmp_path), num_kept + same + 1):
            for name, (attention, first) in ways.items():
                logprobs[name] += csa_logprobs(DEMO_MODEL, attention, page[first:], same)
        figures += [f"{name} {exp(-mean(found)):.2f}" for name, found in logprobs.items()]
        for other in ("own mask", "exact"):
            worse = [one - reuse for one, reuse in zip(logprobs[other], logprobs["reuse"], strict=True)]
            error = stdev(worse) / len(worse) ** 0.5
            figures.append(f"reuse {exp(mean(worse)):.4f} x {other}, standard error {error:.4f}")
            assert mean(worse) <= log(WORSE)
        figures.append(f"{len(worse):,} tokens")


def pages(text: Path, num_tokens: int) -> Sequence[Sequence[int]]:
    """NUM_PAGES spans of a text, evenly spaced, the first token of texts in front of each."""
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    (bos,) = tokenizer.encode("").ids
    tokens = read_text(text, tokenizer).tolist()
    step = (len(tokens) - num_tokens) // NUM_PAGES
    return [[bos, *tokens[step * page :][: num_tokens - 1]] for page in range(NUM_PAGES)]
