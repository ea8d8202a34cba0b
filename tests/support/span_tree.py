"""What a request's spans must be to each other: parents, and times that add up."""

import re
from collections.abc import Sequence
from itertools import pairwise

from support.collector import SeenSpan

PHASES = ("queue", "prefill", "transfer", "decode")
SHARE = 0.05
"""Of the request's time, by how much its phases may miss it."""


def root_of(spans: Sequence[SeenSpan]) -> SeenSpan:
    """The router's span of the request."""
    (root,) = [span for span in spans if span.name.startswith(("text_completion ", "chat "))]
    return root


def is_complete(spans: Sequence[SeenSpan], num_prefill: int, num_decode: int) -> bool:
    """Whether the request, all phases of one attempt and so many ranks are there."""
    kinds = [re.sub(r" \d+$", "", span.name) for span in spans]
    wanted = {"prefill rank": num_prefill, "decode rank": num_decode} | dict.fromkeys(PHASES, 1)
    return all(kinds.count(kind) >= count for kind, count in wanted.items()) and len(spans) > sum(
        wanted.values()
    )


def check_tree(spans: Sequence[SeenSpan], parent_id: str, rank_share: float = SHARE) -> str:
    """Raises AssertionError; else in words what was found.

    Args:
        spans: all of one trace of a request that took one attempt.
        parent_id: the client's own span; empty without one.
        rank_share: of the request's time, by how much ranks may miss their phase: the router hears of them later.
    """
    root = root_of(spans)
    assert root.parent_id == parent_id
    slack = rank_share * root.seconds
    phases = {name: _only(spans, name) for name in PHASES}
    assert {span.parent_id for span in phases.values()} == {root.span_id}
    total = sum(span.seconds for span in phases.values())
    assert abs(total - root.seconds) <= SHARE * root.seconds, f"phases take {total} s of {root.seconds} s"
    for earlier, later in pairwise(PHASES):
        assert abs(phases[earlier].end_s - phases[later].begin_s) < 1e-3
    ranks = {
        name: [span for span in spans if span.name.startswith(f"{name} rank ")]
        for name in ("prefill", "decode")
    }
    for name, found in ranks.items():
        phase = phases[name]
        for span in found:
            assert span.parent_id == phase.span_id, f"{span.name} is not beneath {name}"
            assert span.service == f"sps2-{name}"
            assert span.begin_s >= phase.begin_s - slack
            assert span.end_s <= phase.end_s + slack
        longest = max(span.seconds for span in found)
        assert abs(longest - phase.seconds) <= slack, f"{name}: ranks {longest} s, phase {phase.seconds} s"
    parts = ", ".join(f"{name} {span.seconds * 1000:.0f}" for name, span in phases.items())
    return (
        f"request {root.seconds * 1000:.0f} ms = {parts} ({abs(total - root.seconds) / root.seconds:.2%} off), "
        f"{len(ranks['prefill'])} prefill and {len(ranks['decode'])} decode ranks beneath their phases"
    )


def _only(spans: Sequence[SeenSpan], name: str) -> SeenSpan:
    (found,) = [span for span in spans if span.name == name]
    return found
