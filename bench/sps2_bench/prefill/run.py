"""Runs the cases: engines stay alive, cases take turns, so that a drift of the machine hits all alike."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from sps2_bench.prefill.cases import SPS2, Case, Engine, Rates, Sample
from sps2_bench.processes import Message
from sps2_bench.team import Team
from sps2_engine.attention.trace import Event, Trace

Progress = Callable[[Case, Sample], None]


def make_team(engine: Engine, folder: Path, cpus: Sequence[int], shard_tokens: int) -> Team:
    """Starts the processes of an engine.

    Raises:
        ValueError: there are more ranks than cores.
    """
    module = "sps2_bench.prefill." + ("rank" if engine.program == "sps2" else "transformers_peer")
    settings = {"folder": str(folder), "dtype": engine.dtype, "shard_tokens": shard_tokens}
    return Team(module, settings, engine.ranks, cpus)


def run_case(team: Team, case: Case) -> Sample:
    """One prefill.

    Raises:
        WorkerError: a rank ended or fell silent.
    """
    return merge(team.run(_prompt(case, timeline=False)))


def run_timeline(team: Team, case: Case) -> list[Trace]:
    """One more prefill, what each rank did when.

    Raises:
        WorkerError: a rank ended or fell silent.
    """
    answers = team.run(_prompt(case, timeline=True))
    return [
        Trace(rank, [Event(**event) for event in answer["events"]]) for rank, answer in enumerate(answers)
    ]


def measure_team(team: Team, engine: Engine) -> Rates | None:
    """What the ranks compute together, measured now; None of a program that does not tell.

    Raises:
        WorkerError: a rank ended or fell silent.
    """
    if engine.program != SPS2:
        return None
    rates = [Rates(**answer) for answer in team.run({})]
    return Rates(
        sum(one.attention_flops_per_s for one in rates), sum(one.linear_flops_per_s for one in rates)
    )


def _prompt(case: Case, *, timeline: bool) -> Message:
    return {
        "length": case.length,
        "profile": case.profile,
        "exchange": case.exchange,
        "timeline": timeline,
    }


def merge(answers: Sequence[Message]) -> Sample:
    """One sample of what all ranks say: the first token's time is that of the rank that has it."""
    last = next(answer for answer in answers if answer["token_id"] is not None)
    return Sample(
        seconds=last["seconds"],
        token_id=last["token_id"],
        exposed_s=max(answer["exposed_s"] for answer in answers),
        posted_bytes=sum(answer["posted_bytes"] for answer in answers),
        rss_before=max(answer["rss_before"] for answer in answers),
        peak_rss=max(answer["peak_rss"] for answer in answers),
    )


@dataclass(frozen=True)
class Measured:
    """What a run gave."""

    samples: dict[Case, list[Sample]]
    threads: dict[Engine, int]
    """Threads of a rank."""
    rates: dict[Engine, Rates | None]
    traces: dict[Case, list[Trace]]
    """Of each rank, where they were asked for."""


def run_cases(
    cases: Sequence[Case],
    folder: Path,
    cpus: Sequence[int],
    shard_tokens: int,
    repeats: Callable[[int], int],
    progress: Progress,
    traced: Callable[[Case], bool],
) -> Measured:
    """Measures every case.

    Args:
        cases: in the order they take turns.
        folder: of the model.
        cpus: cores to use.
        shard_tokens: fewest tokens of a shard.
        repeats: runs of a case by its prompt length.
        progress: told the case and the sample of each run.
        traced: whether to run a case once more and record what each rank does when.

    Raises:
        ValueError: an engine has more ranks than there are cores.
        WorkerError: a process ended or fell silent.
    """
    samples: dict[Case, list[Sample]] = {case: [] for case in cases}
    with ExitStack() as stack:
        teams = {
            engine: stack.enter_context(make_team(engine, folder, cpus, shard_tokens))
            for engine in dict.fromkeys(case.engine for case in cases)
        }
        shortest = min(case.length for case in cases)
        for case in cases:
            if case.length == shortest:
                run_case(teams[case.engine], case)  # first runs pay for what initialises itself lazily
        rates = {engine: measure_team(team, engine) for engine, team in teams.items()}
        for round_ in range(max(repeats(case.length) for case in cases)):
            for case in cases:
                if round_ < repeats(case.length):
                    sample = run_case(teams[case.engine], case)
                    samples[case].append(sample)
                    progress(case, sample)
        traces = {case: run_timeline(teams[case.engine], case) for case in cases if traced(case)}
        return Measured(samples, {engine: team.threads for engine, team in teams.items()}, rates, traces)
