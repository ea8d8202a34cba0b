"""Must show 4: a ten-turn conversation about a document computes what is new, and loses nothing by it."""

import json
from pathlib import Path
from statistics import mean, stdev

import pytest

from sps2_layout.profiles import EXACT
from support.conversations import Conversation, tell
from support.csa_oracle import csa_tokens
from support.deployment import DEMO_MODEL, deployment
from support.identity import Tally
from support.must_show import MustShow
from support.oracle import compare

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(1800)]

NUM_TOKENS, NUM_TURNS, NUM_MORE = 6_000, 10, 4
WORSE = 1.02
"""Perplexity with reuse is at most so many times that without."""
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
        worse = [one - other for one, other in zip(without.logprobs, reused.logprobs, strict=True)]
        error = stdev(worse) / len(worse) ** 0.5
        figures.append(f"perplexity {reused.perplexity:.3f}, without {without.perplexity:.3f}")
        figures.append(f"log probability lower by {mean(worse):.3f}, standard error {error:.3f}")
        figures.append(f"found {sum(reused.found)} of {NUM_TURNS} facts, without {sum(without.found)}")
        if profile is None:
            tally = Tally()
            for prompt, one, other in zip(reused.prompts, reused.answers, without.answers, strict=True):
                gaps = [float("inf")] * len(one.token_ids)
                if one.token_ids != other.token_ids:
                    gaps = csa_tokens(DEMO_MODEL, EXACT, prompt, len(one.token_ids))[1]
                tally.add(compare(one.token_ids, other.token_ids, gaps))
            tally.check()
        assert reused.perplexity <= WORSE * without.perplexity
        assert sum(reused.found) >= sum(without.found)
