"""What `sps2 bench decode` measures and what it costs; nothing is run."""

from pathlib import Path

import pytest

from sps2_bench.decode.cases import (
    Case,
    Engine,
    Row,
    Sample,
    list_cases,
    planned_bytes_per_token,
    read_bytes,
    rows_of,
    slopes,
)
from sps2_bench.decode.plots import write_plots
from sps2_bench.decode.run import merge
from sps2_bench.prefill.random_model import DEFAULT_SHAPE, model_config

CONFIG = model_config(DEFAULT_SHAPE)
CONTEXTS = (1024, 2048, 16_384, 65_536)


def engine(ranks: int, form: str = "q") -> Engine:
    return Engine("sps2", form, ranks, "fp32")


def sample(step_s: float, tokens: tuple[int, ...] = (1, 2)) -> Sample:
    return Sample((step_s,) * 4, 0.0, (tokens, (3, 4)))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("batch", [1, 8])
def test_moving_q_costs_the_closed_form_whatever_the_context(ranks: int, batch: int) -> None:
    # decode.md: (h - 1) * Hq * (2 b d + 4) for each layer, every rank a holder.
    heads, head_dim, layers = DEFAULT_SHAPE["heads"], DEFAULT_SHAPE["head_dim"], DEFAULT_SHAPE["layers"]
    expected = (ranks - 1) * heads * (2 * 4 * head_dim + 4) * layers
    planned = {planned_bytes_per_token(Case(engine(ranks), one, batch), CONFIG) for one in CONTEXTS}
    assert planned == {expected}


def test_moving_kv_costs_what_lies_away_from_home() -> None:
    token = 2 * DEFAULT_SHAPE["kv_heads"] * DEFAULT_SHAPE["head_dim"] * 4 * DEFAULT_SHAPE["layers"]
    for context in CONTEXTS:
        assert planned_bytes_per_token(Case(engine(2, "kv"), context, 2), CONFIG) == context / 2 * token
    assert planned_bytes_per_token(Case(engine(1, "kv"), 1024, 2), CONFIG) == 0


def test_rows_lie_on_as_many_ranks_as_blocks_allow_and_homes_take_turns() -> None:
    rows, ranges = rows_of(200, 3, 2)
    assert ranges == ((0, 128), (128, 200))
    assert [(row.home, row.holders) for row in rows] == [(0, (0, 1)), (1, (0, 1)), (0, (0, 1))]
    assert rows_of(64, 2, 4)[1] == ((0, 64),)


def test_a_step_reads_weights_once_for_each_home_and_all_kv() -> None:
    one, two = (read_bytes(Case(engine(ranks), 2048, 1), CONFIG) for ranks in (1, 2))
    assert one == two
    kv = 2048 * 2 * 2 * 64 * 4 * 8
    weights = one - kv
    assert weights == 4 * (CONFIG.num_parameters - 2048 * 512)
    assert read_bytes(Case(engine(2), 2048, 8), CONFIG) == 2 * weights + 8 * kv


def test_cases_stand_beside_what_they_are_compared_with() -> None:
    cases = list(list_cases((128, 256), (1, 2), (1, 2), ("fp32",), ("q", "kv"), ("transformers",)))
    assert [(case.context, case.batch) for case in cases[::5]] == [(128, 1), (128, 2), (256, 1), (256, 2)]
    forms = [(case.engine.program, case.engine.form, case.engine.ranks) for case in cases[:5]]
    assert forms == [
        ("transformers", "dynamic", 1),
        ("transformers", "static", 1),
        ("sps2", "q", 1),
        ("sps2", "q", 2),
        ("sps2", "kv", 2),
    ]


def test_the_document_compares_with_both_caches() -> None:
    def row(program: Engine, step_s: float, tokens: tuple[int, ...] = (1, 2)) -> Row:
        return Row(Case(program, 128, 2), (sample(step_s, tokens),), 2, CONFIG)

    rows = [
        row(Engine("transformers", "dynamic", 1, "fp32"), 0.4),
        row(Engine("transformers", "static", 1, "fp32"), 0.2),
        row(engine(1), 0.1, (1, 9)),
    ]
    document = rows[2].document(rows)
    assert (document["speedup"], document["speedup_static"], document["same_streams"]) == (4.0, 2.0, 1)
    figures = [document[name] for name in ("tokens_per_s", "tbt_p50_s", "tbt_p99_s")]
    assert figures == pytest.approx([20.0, 0.1, 0.1])
    assert rows[2].document(rows[2:])["speedup"] is None


def test_a_step_ends_with_the_slowest_rank() -> None:
    merged = merge(
        [
            {"step_s": [0.1, 0.4], "posted_bytes": {"q_exchange": 30}, "streams": {"1": [5, 6, 7]}},
            {
                "step_s": [0.2, 0.3],
                "posted_bytes": {"q_exchange": 50, "tensor": 20},
                "streams": {"0": [8, 9, 1]},
            },
        ]
    )
    assert merged == Sample((0.2, 0.4), 20.0, ((8, 9, 1), (5, 6, 7)), 5.0)


def test_slopes_and_plots(tmp_path: Path) -> None:
    rows = []
    for context in CONTEXTS:
        for form in ("q", "kv"):
            case = Case(engine(2, form), context, 1)
            row = Row(case, (sample(0.1),), 1, CONFIG).document([])
            rows.append({**row, "bytes_per_token": planned_bytes_per_token(case, CONFIG)})
    found = {one["form"]: one["bytes_per_token_and_context_token"] for one in slopes(rows)}
    assert found["q"] == 0
    assert found["kv"] == pytest.approx(4096)
    assert slopes(rows[:2]) == []
    assert all(path.stat().st_size for path in write_plots(rows, tmp_path))
