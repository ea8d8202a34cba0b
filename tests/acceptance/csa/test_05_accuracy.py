"""Must show 5: what each profile loses, from one command, and the default by its rule."""

import math
from pathlib import Path
from typing import Any

import pytest

from sps2_bench.accuracy.candidates import catalogue
from sps2_layout.profiles import default_profile
from support.bench import sps2_json
from support.deployment import DEMO_MODEL
from support.held_out import write_held_out
from support.must_show import MustShow

TIMEOUT_S = 3 * 3_600
"""About 40 minutes on two idle cores; other work there must not end it."""

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(TIMEOUT_S)]

TOKENS = 200_000
QUESTIONS = 500
PROFILES = 12
SHARDS, TAIL = 8, 64


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> dict[str, Any]:
    """The report and its plots go to `.out/csa/accuracy`."""
    text = write_held_out(repo_root, tmp_path_factory.mktemp("accuracy"))
    options: list[str | Path] = [
        "--model",
        DEMO_MODEL,
        "--text",
        text,
        "--tokens",
        str(TOKENS),
        "--plots",
        repo_root / ".out" / "csa" / "accuracy",
    ]
    return sps2_json("eval", "accuracy", *options, timeout_s=TIMEOUT_S)


def test_sizes(must_show: MustShow, document: dict[str, Any]) -> None:
    with must_show("5 accuracy: sizes") as figures:
        asked = sum(document["questions"].values())
        names = [one["name"] for one in document["profiles"]]
        figures.append(f"{len(names)} profiles, {document['scored_tokens']:,} tokens, {asked:,} questions")
        assert document["scored_tokens"] >= TOKENS
        assert asked >= QUESTIONS
        assert len(names) >= PROFILES
        assert any(one["is_local"] for one in document["profiles"])
        for one in document["profiles"]:
            loss = one["perplexity_loss"]
            assert all(isinstance(loss[key], float) and math.isfinite(loss[key]) for key in loss)
        assert all(Path(plot).is_file() for plot in document["plots"])


def test_default_by_the_rule(must_show: MustShow, document: dict[str, Any]) -> None:
    with must_show("5 accuracy: default by its rule") as figures:
        profiles = {one["name"]: one for one in document["profiles"]}
        for name, one in profiles.items():
            figures.append(
                f"\n  {name}: {one['flops_saved']:.0%} FLOPs saved, perplexity "
                f"{100 * one['perplexity_loss']['value']:+.2f}%, retrieval "
                f"{-100 * one['retrieval_loss']['value']:+.1f} points, "
                f"{one['repeat_gain']['value']:+.3f} nats over {one['local_name'] or 'itself'}"
            )
        assert document["default"] is not None, "no profile meets the rule"
        chosen = profiles[document["default"]]
        figures.append(f"\n  chosen: {document['default']}")
        assert all(chosen["verdicts"].values())
        assert catalogue(SHARDS, TAIL)[document["default"]].ladder.rungs == (default_profile(SHARDS),)
        cheaper = [
            one
            for one in profiles.values()
            if one["cost"]["flops"] < chosen["cost"]["flops"] and not one["is_local"]
        ]
        assert not any(all(one["verdicts"].values()) for one in cheaper)
