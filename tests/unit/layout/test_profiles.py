"""Profiles: which mask a prompt's length chooses, and what a profile file may say."""

import json
from pathlib import Path
from typing import Any

import pytest

from sps2_layout.attention import Attention
from sps2_layout.layout import Level
from sps2_layout.profile_file import ProfileError, load_profile, parse_profile
from sps2_layout.profiles import DEFAULT, EXACT, NAMED, PAPER, Ladder, Profile

RUNG = {"shards": 4, "levels": [[1, 1], [4, 2]]}


@pytest.mark.parametrize(
    ("num_tokens", "num_shards"),
    [
        (1, 0),
        (8_191, 0),
        (8_192, 2),
        (16_383, 2),
        (16_384, 4),
        (32_768, 8),
        (65_535, 8),
        (65_536, 16),
        (1 << 20, 256),
    ],
)
def test_the_ladder_by_length(num_tokens: int, num_shards: int) -> None:
    for ladder in (DEFAULT, PAPER):
        layout = ladder.resolve(num_tokens)
        assert (layout.num_shards if layout else 0) == num_shards
    assert EXACT.resolve(num_tokens) is None


def test_the_named_profiles() -> None:
    paper, default = PAPER.resolve(40_000), DEFAULT.resolve(70_000)
    assert paper is not None
    assert default is not None
    assert (paper.levels, paper.tail, paper.sinks, paper.dense_queries) == (
        (Level(1, 1), Level(8, 8)),
        0,
        0,
        False,
    )
    assert default.levels == (Level(1, 1), Level(16, 8))
    assert (default.tail, default.sinks, default.dense_queries) == (64, 0, False)
    assert set(NAMED) == {"exact", "paper", "default"}


def test_what_usage_says() -> None:
    assert Attention.admit(DEFAULT, 500).describe() == "exact"
    said = Attention.admit(DEFAULT, 32_768).describe()
    assert said == "N=8 A=4096 levels (1,1),(8,8) sampled tail 64 sinks 0"


@pytest.mark.parametrize(
    ("group_size", "num_ranks"), [(1, 1), (2, 2), (3, 2), (4, 4), (7, 4), (8, 8), (16, 8)]
)
def test_a_group_uses_ranks_that_divide_the_shards(group_size: int, num_ranks: int) -> None:
    attention = Attention.admit(DEFAULT, 40_000)
    assert attention.num_ranks(group_size) == num_ranks
    layout = attention.sliced(group_size)
    spans = [layout.rank_tokens(rank, num_ranks) for rank in range(group_size)]
    assert spans[0].begin == 0
    assert [span.begin for span in spans[1:]] == [span.end for span in spans[:-1]]
    assert spans[-1].end == 40_000
    assert max(len(span) for span in spans) == len(spans[0])


def test_exact_slices_over_every_rank() -> None:
    attention = Attention.admit(EXACT, 10)
    assert [attention.num_ranks(size) for size in (1, 3, 4)] == [1, 3, 4]
    layout = attention.sliced(4)
    assert [len(layout.rank_tokens(rank, 4)) for rank in range(4)] == [3, 3, 3, 1]


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    smaller = {"shards": 2, "levels": [[1, 1]], "query_mode": "dense", "tail": 9, "sinks": 3}
    path.write_text(json.dumps({"min_shard_tokens": 128, "profiles": [smaller, RUNG]}))
    ladder = load_profile(str(path))
    rungs = (Profile(2, ((1, 1),), dense_queries=True, sinks=3, tail=9), Profile(4, ((1, 1), (4, 2))))
    assert ladder == Ladder("mine", rungs, 128)
    assert [ladder.resolve(n) is None for n in (255, 256)] == [True, False]
    assert load_profile("paper") is PAPER


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "the document is not an object"),
        ({}, "profiles missing"),
        ({"profiles": {}}, "profiles must be a list"),
        ({"profiles": [], "min_shards": 1}, "unknown min_shards; there are min_shard_tokens, profiles"),
        ({"profiles": [], "min_shard_tokens": True}, "min_shard_tokens must be a whole number"),
        ({"profiles": [], "min_shard_tokens": 0}, "at least one token"),
        ({"profiles": [7]}, r"profiles\[0\] is not an object"),
        ({"profiles": [{"shards": 4}]}, r"profiles\[0\]: levels missing"),
        ({"profiles": [RUNG | {"shards": 6}]}, r"profiles\[0\]: shards and groups must be powers of two"),
        ({"profiles": [RUNG | {"shards": -4}]}, "shards must be a whole number"),
        ({"profiles": [RUNG | {"levels": []}]}, "levels must be a list of"),
        ({"profiles": [RUNG | {"levels": [[1, 1], [4]]}]}, "levels must be a list of"),
        ({"profiles": [RUNG | {"levels": [[4, 2]]}]}, r"the first level is \(1, 1\)"),
        ({"profiles": [RUNG | {"levels": [[1, 1], [4, 0]]}]}, "strides must be at least 1"),
        ({"profiles": [RUNG | {"levels": [[1, 1], [8, 2]]}]}, "must divide all 4 shards"),
        ({"profiles": [RUNG | {"levels": [[1, 1], [2, 2], [4, 3]]}]}, "must each divide the next"),
        ({"profiles": [RUNG | {"query_mode": "none"}]}, "query_mode 'none' is none of sampled, dense"),
        ({"profiles": [RUNG | {"tail": -1}]}, "tail must be a whole number"),
        ({"profiles": [RUNG, RUNG]}, "ascending"),
    ],
)
def test_files_that_cannot_be_used(document: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_profile("x", json.dumps(document))


def test_names_and_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="'papier' is none of exact, paper, default, nor a file"):
        load_profile("papier")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ProfileError, match=r"broken\.json: Expecting property name"):
        load_profile(str(broken))
