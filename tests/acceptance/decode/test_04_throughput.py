"""Must show 4: decode beside transformers on the same cores; time between tokens while streams join and leave.

Needs two cores of its own; figures are ratios within the run, never seconds. The peer is transformers as `generate`
runs it, whose cache is the dynamic one; what the static one gives is printed beside it. Rows and plots go to
`.out/decode/throughput`.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.bench import Row, find, sps2_json
from support.deployment import DEMO_MODEL, deployment
from support.must_show import MustShow
from support.streams import Asked, ask, mixed_requests

pytestmark = pytest.mark.acceptance

K = 1024
TIMEOUT_S = 3_000
GOALS = {(2 * K, 1, (1, 1)): 1.5, (2 * K, 1, (1, 2)): 1.0, (2 * K, 8, (1, 1)): 1.5, (16 * K, 8, (1, 1)): 3.0}
"""Context, batch, (sequence, tensor) ranks: tokens/s over those of transformers, at least."""
RUNS = (
    ("--contexts", "2k,16k", "--ranks", "1,2"),
    ("--contexts", "2k", "--ranks", "1", "--tensor", "2"),
)
"""Of the benchmark; two ranks that spread KV, and two that split layers."""
COMMON = ("--batches", "1,8", "--steps", "48", "--repeat", "3", "--baselines", "transformers")
MOST_P99_OVER_P50 = 4.0
WATCHED_TOKENS, OTHERS = 600, 24


@pytest.fixture(scope="module")
def rows(repo_root: Path) -> list[Row]:
    """The random model of `bench prefill` in fp32: one rank of two threads, and two of one."""
    found: list[Row] = []
    for number, run in enumerate(RUNS):
        plots = repo_root / ".out" / "decode" / "throughput" / str(number)
        options: list[str | Path] = [*run, *COMMON, "--plots", plots]
        found += sps2_json("bench", "decode", *options, timeout_s=TIMEOUT_S)["rows"]
    return found


def test_streams_are_those_of_transformers(must_show: MustShow, rows: list[Row]) -> None:
    with must_show("4 throughput: the same tokens as transformers") as figures:
        assert all(row["same_streams"] == row["batch"] for row in rows)
        figures.append(f"{len(rows)} runs")


@pytest.mark.parametrize(("context", "batch", "mesh"), GOALS)
def test_tokens_per_second(
    must_show: MustShow, rows: list[Row], context: int, batch: int, mesh: tuple[int, int]
) -> None:
    ranks, tensor = mesh
    name = f"4 throughput: {batch} x {context // K}k on {ranks * tensor} rank(s)"
    with must_show(name) as figures:
        goal = GOALS[context, batch, mesh]
        row = find(rows, program="sps2", context=context, batch=batch, ranks=ranks, tensor=tensor)
        figures.append(f"{row['speedup']:.2f} x transformers (at least {goal})")
        figures.append(f"{row['speedup_static']:.2f} x with its static cache")
        if tensor > 1:
            spread = find(rows, program="sps2", context=context, batch=batch, ranks=tensor, tensor=1)
            figures.append(f"that is with layers split; with KV spread {spread['speedup']:.2f} x")
        assert row["speedup"] >= goal


def test_time_between_tokens_while_streams_join_and_leave(must_show: MustShow) -> None:
    """On the clock of the decode leader, as the stream's usage tells."""
    with must_show("4 time between tokens while others join and leave") as figures:
        watched, *others = mixed_requests([64] * (1 + OTHERS))
        watched = Asked(watched.prompt, WATCHED_TOKENS, None)
        with (
            deployment(DEMO_MODEL, "1x1", "1x1", ["--threads", "1"]) as running,
            running.client() as client,
            ThreadPoolExecutor(3) as pool,
        ):
            long = pool.submit(ask, client, watched)
            came = list(pool.map(lambda asked: ask(client, asked), others))
        during = sum(answer.ended < long.result().ended for answer in came)
        assert during >= OTHERS // 2, "the others came and went before or after"
        timings = long.result().usage.timings
        ratio = timings.tbt_p99 / timings.tbt_p50
        figures.append(
            f"p99 {ratio:.2f} x p50 (at most {MOST_P99_OVER_P50:g}) over {WATCHED_TOKENS - 1} tokens"
        )
        figures.append(f"{during} others ended meanwhile")
        assert ratio <= MOST_P99_OVER_P50
