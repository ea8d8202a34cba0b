"""What is measured and what it costs; nothing is run."""

import json
from pathlib import Path

import pytest
import torch

from sps2_bench.csa import named_layout, without_last
from sps2_bench.prefill.cases import (
    PEER,
    Case,
    Cost,
    Engine,
    Rates,
    Row,
    Sample,
    cost_of,
    linear_flops,
    list_cases,
)
from sps2_bench.prefill.plots import write_plots
from sps2_bench.prefill.random_model import DEFAULT_SHAPE, model_config, write_random_model
from sps2_bench.prefill.run import merge
from sps2_engine.models import load_decoder, random_decoder

CONFIG = model_config(DEFAULT_SHAPE)
ONE, TWO = Engine("sps2", 1, "fp32"), Engine("sps2", 2, "fp32")
RATES = Rates(attention_flops_per_s=2e9, linear_flops_per_s=8e9)


def sample(seconds: float) -> Sample:
    return Sample(seconds, token_id=7, exposed_s=0.1, posted_bytes=10, rss_before=100, peak_rss=200)


@pytest.mark.parametrize(
    ("num_tokens", "shards"), [(1, 1), (8191, 1), (8192, 2), (32768, 8), (65535, 8), (65536, 16)]
)
def test_ladder(num_tokens: int, shards: int) -> None:
    assert named_layout("default", num_tokens, 1).num_shards == shards


def test_ladder_is_dense_below_the_threshold() -> None:
    assert named_layout("default", 8000, 1).is_exact
    assert not named_layout("default", 8192, 1).is_exact


def test_without_last_keeps_shards_and_moves_the_tail() -> None:
    whole = named_layout("default", 8192, 1)
    cut = without_last(whole, 10)
    assert (cut.num_tokens, cut.shard_tokens, cut.tail) == (8182, whole.shard_tokens, whole.tail - 10)
    assert cut.tail_span.begin == whole.tail_span.begin


def test_cases_stand_side_by_side() -> None:
    cases = list(list_cases([64, 128], ["exact", "paper"], [1, 2], ["fp32"], ["transformers"]))
    assert [case.length for case in cases] == [64] * 5 + [128] * 5
    assert cases[0] == Case(Engine("transformers", 1, "fp32"), 64, "exact")
    assert set(cases[1:5]) == {Case(e, 64, p) for e in (ONE, TWO) for p in ("exact", "paper")}


def test_linear_flops_are_those_of_the_matrices() -> None:
    per_layer = 512 * (512 + 2 * 128) + 512 * 512 + 3 * 512 * 1408
    norms = 17 * 512  # counted as products too: a share of 0.0004
    assert linear_flops(CONFIG, 1000) == 2 * (1000 * (8 * per_layer + norms) + 2048 * 512)


def test_floor_of_the_papers_profile_at_32k() -> None:
    """By hand: own shards 1/8 of dense attention, the rest in 1/64; linear layers as they are."""
    exact, paper = (cost_of(Case(ONE, 32768, name), CONFIG, 4096) for name in ("exact", "paper"))
    assert paper.attention_flops / exact.attention_flops == pytest.approx(1 / 8 + 7 / 8 / 64, rel=0.001)
    assert exact.flops / paper.flops == pytest.approx(3.8, abs=0.1)
    assert paper.bytes == 0


def test_ranks_that_do_not_divide_the_shards_are_refused() -> None:
    with pytest.raises(ValueError, match="3 ranks"):
        cost_of(Case(Engine("sps2", 3, "fp32"), 8192, "paper"), CONFIG, 4096)


def test_speed_up_is_against_exact_of_the_same_engine() -> None:
    cases = [Case(engine, 8192, name) for engine in (ONE, TWO) for name in ("exact", "paper")]
    times = [(4.0, 6.0, 5.0), (1.0, 2.0, 2.0), (3.0,), (1.0,)]
    rows = [
        Row(case, cost_of(case, CONFIG, 4096), tuple(map(sample, ts)), 1, RATES)
        for case, ts in zip(cases, times, strict=True)
    ]
    peer = Case(PEER, 8192, "exact")
    rows.append(Row(peer, cost_of(peer, CONFIG, 4096), (sample(12.0),), 2, None))
    documents = [row.document(rows) for row in rows]
    assert [one["ttft_s"] for one in documents] == [5.0, 2.0, 3.0, 1.0, 12.0]
    assert [one["speedup"] for one in documents] == [1.0, 2.5, 1.0, 3.0, 1.0]
    assert [one["over_transformers"] for one in documents] == [2.4, 6.0, 4.0, 12.0, 1.0]
    assert documents[1]["flops_speedup"] == rows[0].cost.flops / rows[1].cost.flops
    floors = [row.cost.attention_flops / 2e9 + row.cost.linear_flops / 8e9 for row in rows[:2]]
    assert documents[1]["floor_speedup"] == floors[0] / floors[1]
    assert documents[4]["floor_speedup"] is None
    assert rows[1].document(rows[1:2])["speedup"] is None


def test_a_floor_counts_each_kind_at_its_rate() -> None:
    assert Cost(attention_flops=6, linear_flops=8, bytes=0).floor_s(Rates(3.0, 2.0)) == 2 + 4


def test_first_token_is_the_last_ranks() -> None:
    first = {
        "seconds": 9.0,
        "token_id": None,
        "exposed_s": 0.5,
        "posted_bytes": 3,
        "rss_before": 5,
        "peak_rss": 8,
    }
    last = {
        "seconds": 2.0,
        "token_id": 4,
        "exposed_s": 0.1,
        "posted_bytes": 4,
        "rss_before": 6,
        "peak_rss": 7,
    }
    assert merge([first, last]) == Sample(2.0, 4, 0.5, 7, 6, 8)


def test_random_folder_holds_the_random_decoder(tmp_path: Path) -> None:
    config = model_config({**DEFAULT_SHAPE, "hidden": 32, "intermediate": 48, "layers": 1, "vocab": 64})
    cpu = torch.device("cpu")
    loaded = load_decoder(write_random_model(config, tmp_path, seed=3), torch.float32, cpu)
    drawn = random_decoder(config, 3, torch.float32, cpu)
    hidden = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.logits(hidden), drawn.logits(hidden))
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_plots_are_written(tmp_path: Path) -> None:
    cases = [Case(ONE, length, name) for length in (8192, 16384) for name in ("exact", "paper")]
    rows = [Row(case, cost_of(case, CONFIG, 4096), (sample(1.0),), 1, RATES) for case in cases]
    paths = write_plots([row.document(rows) for row in rows], tmp_path / "plots")
    assert len(paths) == 3
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
