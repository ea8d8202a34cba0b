"""Runs the cases: engines stay alive, cases take turns, so that a drift of the machine hits all alike."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from sps2_bench.decode.cases import Case, Engine, Sample
from sps2_bench.processes import Message
from sps2_bench.team import Team
from sps2_engine.layers.tensor_ranks import KIND as TENSOR

Progress = Callable[[int, Case, Sample], None]

WARM_UP = 4
"""Steps of each run that are not counted: caches of the processor and of the allocator fill."""


def make_team(engine: Engine, folder: Path, cpus: Sequence[int], *, share_cores: bool) -> Team:
    """Starts the processes of an engine.

    Raises:
        ValueError: there are more ranks than cores, and they may not share them.
    """
    module = "sps2_bench.decode." + ("rank" if engine.program == "sps2" else "transformers_peer")
    settings = {
        "folder": str(folder),
        "dtype": engine.dtype,
        "form": engine.form,
        "tensor": engine.tensor,
    }
    return Team(module, settings, engine.processes, cpus, share_cores=share_cores)


def run_case(team: Team, case: Case, steps: int) -> Sample:
    """One run.

    Raises:
        WorkerError: a rank ended or fell silent.
    """
    message = {"context": case.context, "batch": case.batch, "warm_up": WARM_UP, "steps": steps}
    return merge(team.run(message))


def merge(answers: Sequence[Message]) -> Sample:
    """One sample of what all ranks say; a step ends when the slowest rank's does."""
    streams = {int(row): tuple(ids) for answer in answers for row, ids in answer["streams"].items()}
    step_s = tuple(map(max, zip(*(answer["step_s"] for answer in answers), strict=True)))
    posted: Counter[str] = Counter()
    for answer in answers:
        posted.update(answer["posted_bytes"])
    num_tokens, sums = len(step_s) * len(streams), posted.pop(TENSOR, 0)
    return Sample(
        step_s,
        posted.total() / num_tokens,
        tuple(streams[row] for row in sorted(streams)),
        sums / num_tokens,
    )


def run_cases(
    cases: Sequence[Case],
    folder: Path,
    cpus: Sequence[int],
    steps: int,
    repeat: int,
    progress: Progress,
    *,
    share_cores: bool,
) -> tuple[dict[Case, list[Sample]], dict[Engine, int]]:
    """Measures every case.

    Args:
        cases: in the order they take turns.
        folder: of the model.
        cpus: cores to use.
        steps: of each run.
        repeat: runs of each case.
        progress: told the round, the case and the sample of each run.
        share_cores: whether ranks may outnumber the cores.

    Returns:
        The samples of each case, and the threads of a rank of each engine.

    Raises:
        ValueError: an engine has more ranks than there are cores, and they may not share them.
        WorkerError: a process ended or fell silent.
    """
    samples: dict[Case, list[Sample]] = {case: [] for case in cases}
    with ExitStack() as stack:
        teams = {
            engine: stack.enter_context(make_team(engine, folder, cpus, share_cores=share_cores))
            for engine in dict.fromkeys(case.engine for case in cases)
        }
        for round_ in range(repeat):
            for case in cases:
                sample = run_case(teams[case.engine], case, steps)
                samples[case].append(sample)
                progress(round_, case, sample)
        return samples, {engine: team.threads for engine, team in teams.items()}
