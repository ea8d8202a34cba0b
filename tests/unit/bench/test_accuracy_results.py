"""From scores to figures, and the default's rule."""

import json
from pathlib import Path
from typing import Any

import pytest

from sps2_bench.accuracy.candidates import EXACT, Candidate, catalogue, choose
from sps2_bench.accuracy.plots import write_plots
from sps2_bench.accuracy.report import COLUMNS, markdown, table_rows
from sps2_bench.accuracy.results import Cost, ProfileResult, choose_default, summarise

LENGTHS = (512, 1024)
CANDIDATES = choose(("sampled-8", "dense-8", "dense-2"), LENGTHS, 8, 64)
LOCAL = "local-t64-s0"
COSTS = {
    EXACT: Cost(100, 100),
    "sampled-8": Cost(20, 30),
    "dense-8": Cost(30, 80),
    "dense-2": Cost(60, 90),
    LOCAL: Cost(10, 0),
}


def score(nll: float, repeat_nll: float, right: tuple[bool, ...]) -> dict[str, Any]:
    return {"nll": nll, "tokens": 10, "kl": 0.1, "repeat_nll": repeat_nll, "repeats": 2, "right": right}


def answers(**by_profile: dict[str, Any]) -> list[dict[str, Any]]:
    """Eight prompts that score alike but for what all profiles share."""
    defaults = {one.name: score(10.0, 1.0, (True, True)) for one in CANDIDATES}
    defaults[LOCAL] = score(10.0, 6.0, (True, True))
    scores = {**defaults, **{name.replace("_", "-"): one for name, one in by_profile.items()}}
    questions = [{"hops": 1, "depth": 0.3}, {"hops": 2, "depth": 0.99}]
    return [
        {"prompt": n, "length": 512 + 512 * (n % 2), "questions": questions, "scores": scores}
        for n in range(8)
    ]


def results(**by_profile: dict[str, Any]) -> dict[str, ProfileResult]:
    return {one.name: one for one in summarise(answers(**by_profile), CANDIDATES, COSTS)}


def test_every_profile_has_its_local_companion() -> None:
    everything = choose(list(catalogue(8, 64)), LENGTHS, 8, 64)
    names = [one.name for one in everything]
    assert names[0] == EXACT
    assert len(names) == len(set(names)) >= 12
    for one in everything[1:]:
        assert one.local_name in names
        (local,) = [other for other in everything if other.name == one.local_name]
        check_local(one, local)


def check_local(one: Candidate, local: Candidate) -> None:
    """Alike but for the levels, at every length."""
    assert local.is_local
    for ours, theirs in zip(one.ladder.rungs, local.ladder.rungs, strict=True):
        assert (theirs.num_shards, theirs.tail, theirs.sinks) == (ours.num_shards, ours.tail, ours.sinks)
        assert theirs.levels == ((1, 1),)


def write_ladder(path: Path, min_shard_tokens: int) -> str:
    rungs = [{"shards": 4, "levels": [[1, 1], [4, 2]], "tail": 7}, {"shards": 8, "levels": [[1, 1], [8, 4]]}]
    path.write_text(json.dumps({"min_shard_tokens": min_shard_tokens, "profiles": rungs}))
    return str(path)


def test_a_file_is_a_candidate_with_a_rung_for_each_length(tmp_path: Path) -> None:
    path = write_ladder(tmp_path / "mine.json", 128)
    exact, mine, dense, local, other = choose([path, "dense-8"], LENGTHS, 8, 64)
    assert [one.name for one in (exact, mine, dense)] == [EXACT, "mine", "dense-8"]
    assert (local.name, other.name) == ("local-mine", "local-t64-s0")
    assert [mine.layout(length).num_shards for length in LENGTHS] == [4, 8]
    check_local(mine, local)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    dense = write_ladder(tmp_path / "mine.json", 256)
    (tmp_path / "dense-8.json").write_text(Path(dense).read_text())
    for names, message in (
        ([dense], "dense at 512 tokens"),
        ([str(tmp_path / "dense-8.json"), "dense-8"], "'dense-8'"),
        ([str(tmp_path / "none.json")], "none.json"),
        (["quick"], "'quick' is none of"),
        (["paper", "paper"], "two profiles are called 'paper'"),
    ):
        with pytest.raises(ValueError, match=message):
            choose(names, (512,) if names == [dense] else (2048,), 8, 64)


@pytest.mark.parametrize("num_shards", [4, 12])
def test_too_few_or_odd_shards_are_refused(num_shards: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        catalogue(num_shards, 64)


def test_figures() -> None:
    found = results(dense_8=score(10.5, 2.0, (True, False)))["dense-8"]
    assert found.perplexity.value == pytest.approx(2.718281828**1.05)
    assert found.perplexity_loss.value == pytest.approx(2.718281828**0.05 - 1)
    assert found.retrieval_loss.value == pytest.approx(0.5)
    assert (found.one_hop.value, found.two_hops.value) == (1.0, 0.0)
    assert found.repeat_gain.value == pytest.approx(2.0)
    assert (found.flops_saved, found.bytes_saved) == pytest.approx((0.7, 0.2))
    assert found.heat["one_hop"][512][2].asked == 4
    assert (found.heat["two_hops"][1024][7].right, found.heat["two_hops"][1024][7].asked) == (0, 4)


def test_the_cheapest_that_is_fit_is_chosen() -> None:
    assert choose_default(list(results().values())) == "sampled-8"


@pytest.mark.parametrize(
    "bad",
    [
        score(10.2, 1.0, (True, True)),  # 2% perplexity
        score(10.0, 1.0, (True, False)),  # retrieval
        score(10.0, 6.0, (True, True)),  # no better than local-only
    ],
)
def test_what_fails_one_condition_is_not(bad: dict[str, Any]) -> None:
    assert choose_default(list(results(sampled_8=bad).values())) == "dense-8"


def test_none_is_an_answer() -> None:
    worse = score(10.0, 7.0, (True, True))
    assert choose_default(list(results(sampled_8=worse, dense_8=worse, dense_2=worse).values())) is None


def test_report_and_plots(tmp_path: Path) -> None:
    found = list(results().values())
    rows = table_rows(found)
    assert all(len(row) == len(COLUMNS) for row in rows)
    page = markdown(found, "sampled-8", {"prompts": 8}, ["accuracy_curve.png"])
    assert "default by the rule: sampled-8" in page
    assert "| dense-8 | 70.0% | 20.0% |" in page
    paths = write_plots(found, "sampled-8", tmp_path / "plots")
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
