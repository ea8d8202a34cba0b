"""What is counted of running decodes while something disturbs them."""

from dataclasses import replace

import pytest

from sps2_bench.interference.load import Arrivals, Load
from sps2_bench.interference.run import list_cases
from sps2_bench.interference.window import Case, Window, beyond_control, document

QUIET, CONTROL, PREFILL = (Case("sps2", 0, what) for what in ("quiet", "control", "prefill"))


def steady(gap_s: float, span_s: float = 8.0) -> Window:
    """Two decodes with a token every `gap_s`, from before the span to after it."""
    times = tuple(gap_s * number for number in range(round((span_s + 4) / gap_s)))
    return Window((times, times), begin=1.0, end=1.0 + span_s)


def test_only_gaps_within_the_span_count() -> None:
    window = Window(((0.0, 1.0, 1.5, 3.0, 3.1), (1.9, 2.0, 5.0)), begin=1.0, end=3.0)
    assert sorted(window.gaps()) == pytest.approx([0.1, 0.5, 1.5])
    assert window.num_tokens == 2
    assert [at for at, _ in window.series()] == pytest.approx([0.0, 0.5, 1.0, 2.0, 2.1, 4.0])
    assert window.measures()["longest"] == 1.5
    with pytest.raises(ValueError, match="within the span"):
        replace(window, end=1.2).measures()


def test_raises_are_taken_within_a_round() -> None:
    rounds = [
        {QUIET: steady(0.1 * drift), CONTROL: steady(0.12 * drift), PREFILL: steady(0.125 * drift)}
        for drift in (1.0, 2.0, 1.5)
    ]
    row = document(rounds, PREFILL)
    assert row["tbt_p50_s"] == pytest.approx(0.125 * 1.5)
    assert row["raise_p50"] == pytest.approx(0.25)
    assert row["raise_all_mean"] == pytest.approx([0.25] * 3)
    assert row["ttft_s"] is None
    assert beyond_control(rounds, "p50") == pytest.approx(0.05)
    assert document(rounds, QUIET)["raise_p99"] == 0


def test_arrivals_begin_when_every_decode_has() -> None:
    arrivals = Arrivals(2)
    for at in (0.0, 1.0, 2.0):
        arrivals.add(0, at)
    arrivals.add(1, 1.5, num_tokens=2)
    assert arrivals.fewest == 2
    assert arrivals.rows() == ((2.0,), (1.5, 1.5))


def test_cases_and_load() -> None:
    cases = list_cases([512, 2_048])
    assert [case.name for case in cases] == ["sps2"] * 3 + ["sarathi 512"] * 2 + ["sarathi 2048"] * 2
    assert all(case.undisturbed in cases for case in cases)
    load = Load(2, 100, 300, "default")
    assert load.context_prompt(0, 50) != load.context_prompt(1, 50)
    assert load.context_prompt(1, 50) == load.context_prompt(1, 50)
    assert len(load.long_prompt(50)) == 300
