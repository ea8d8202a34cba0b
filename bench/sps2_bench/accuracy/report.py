"""The report for people: a table of all profiles and what was chosen, as Markdown and for the terminal."""

import math
from collections.abc import Mapping, Sequence

from sps2_bench.accuracy.results import ProfileResult
from sps2_bench.statistics import Estimate

COLUMNS = (
    "profile",
    "FLOPs saved",
    "bytes saved",
    "perplexity lost",
    "KL at end",
    "repeats inside, perplexity",
    "better than local-only, nats",
    "one hop",
    "two hops",
    "retrieval lost, points",
    "fit",
)


def table_rows(results: Sequence[ProfileResult]) -> list[list[str]]:
    """A row for each profile, in the order of `COLUMNS`; intervals of 95% in brackets."""
    return [
        [
            one.name,
            f"{one.flops_saved:.1%}",
            f"{one.bytes_saved:.1%}",
            _interval(one.perplexity_loss, "{:+.2f}%", 100),
            _interval(one.kl, "{:.4f}"),
            f"{one.repeat_perplexity.value:.2f}",
            _interval(one.repeat_gain, "{:+.3f}") if one.local_name != one.name else "",
            f"{one.one_hop.value:.1%}",
            f"{one.two_hops.value:.1%}",
            _interval(one.retrieval_loss, "{:+.1f}", 100),
            "" if one.is_local or not one.local_name else ", ".join(_failed(one)) or "yes",
        ]
        for one in results
    ]


def _failed(one: ProfileResult) -> list[str]:
    return [f"no: {name}" for name, met in one.verdicts.items() if not met]


def _interval(estimate: Estimate, form: str, factor: float = 1.0) -> str:
    value, low, high = (
        form.format(factor * figure) if math.isfinite(figure) else "-"
        for figure in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value} [{low}, {high}]"


def verdict(chosen: str | None) -> str:
    """One line on the default."""
    return f"default by the rule: {chosen}" if chosen else "default by the rule: none, no profile meets it"


def markdown(
    results: Sequence[ProfileResult], chosen: str | None, settings: Mapping[str, object], plots: Sequence[str]
) -> str:
    """The report as a Markdown page."""
    lines = ["# Accuracy of CSA profiles", "", verdict(chosen), ""]
    lines += [
        "The rule: the cheapest profile by attention FLOPs that loses at most 1% perplexity of the",
        "continuation and at most 2 points of retrieval, and beats the local-only profile with the same tail",
        "and sinks on facts restated inside the prompt by more than the interval. Intervals: 95%, paired",
        "bootstrap over prompts.",
        "",
    ]
    rows = [COLUMNS, ["---"] * len(COLUMNS), *table_rows(results)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", *(f"![{plot}]({plot})" for plot in plots), ""]
    lines += [f"- {name}: {value}" for name, value in settings.items()]
    return "\n".join(lines) + "\n"
