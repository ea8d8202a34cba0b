"""The benchmarks as commands, at sizes of seconds: they run, documents have their fields. Never ratios."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.fact_model import make_fact_model

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(300)]

TINY = "hidden=32,intermediate=48,layers=2,heads=4,kv_heads=2,head_dim=8,vocab=64"
TIMEOUT_S = 240


def sps2(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-P", "-m", "sps2_cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def document(*arguments: str | Path) -> dict[str, Any]:
    result = sps2(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    parsed: dict[str, Any] = json.loads(line)
    assert {"cpu", "cores", "torch", "date"} <= set(parsed["machine"])
    assert all(Path(plot).is_file() for plot in parsed["plots"])
    return parsed


def test_prefill(tmp_path: Path) -> None:
    options = ["--lengths", "128,250", "--shard-tokens", "32", "--repeat", "2", "--random-model", TINY]
    found = document("bench", "prefill", *options, "--baselines", "transformers", "--plots", tmp_path)
    rows = found["rows"]
    ours = [row for row in rows if row["program"] == "sps2"]
    assert len(ours) == 2 * 3 * 2
    assert len(rows) == len(ours) + 2
    fields = {
        "length",
        "profile",
        "ranks",
        "ttft_s",
        "flops",
        "bytes",
        "exposed_s",
        "peak_rss",
        "floor_speedup",
    }
    for row in rows:
        assert fields <= set(row)
        assert len(row["ttft_all_s"]) == 2
        assert row["bytes"] == row["planned_bytes"]
        assert row["peak_rss"] >= row["rss_before"] > 0
    for length in (128, 250):
        exact = {row["token_id"] for row in rows if (row["length"], row["profile"]) == (length, "exact")}
        assert len(exact) == 1, "exact prefill gives transformers' token on one rank and on two"
    assert len(found["plots"]) == 4
    assert json.loads((tmp_path / "prefill.json").read_text())["rows"] == rows


def test_prefill_in_two_dtypes_with_timelines(tmp_path: Path) -> None:
    options = ["--lengths", "600", "--shard-tokens", "32", "--repeat", "1", "--random-model", TINY]
    options += ["--profiles", "default", "--ranks", "2", "--dtypes", "fp32,bf16"]
    found = document("bench", "prefill", *options, "--timeline", tmp_path)
    assert [row["dtype"] for row in found["rows"]] == ["fp32", "bf16"]
    assert all(row["attention_flops_per_s"] > 0 for row in found["rows"])
    names = {
        f"timeline_600_default_2_{dtype}.{kind}" for dtype in ("fp32", "bf16") for kind in ("json", "png")
    }
    assert {path.name for path in tmp_path.iterdir()} == names
    events = json.loads((tmp_path / "timeline_600_default_2_fp32.json").read_text())["traceEvents"]
    kinds = {(event["pid"], event["cat"]) for event in events if event["ph"] != "M"}
    assert kinds == {
        (rank, kind) for rank in (0, 1) for kind in ("linear", "compute", "post", "wait", "flight")
    }
    assert {event["args"]["layer"] for event in events if event["ph"] == "X"} == {0, 1}


def test_decode(tmp_path: Path) -> None:
    options = ["--contexts", "128,250", "--batches", "1,3", "--steps", "6", "--repeat", "1"]
    options += ["--move", "q,kv", "--random-model", TINY, "--baselines", "transformers"]
    found = document("bench", "decode", *options, "--plots", tmp_path)
    rows = found["rows"]
    assert len(rows) == 2 * 2 * (2 + 1 + 2)
    for row in rows:
        assert row["bytes_per_token"] == row["planned_bytes_per_token"]
        assert 0 < row["tbt_p50_s"] <= row["tbt_p99_s"]
        assert row["num_steps"] == 6
        assert row["same_streams"] == row["batch"], "the tokens are transformers' tokens, whatever travels"
    moved = {(one["form"], one["ranks"]): one["bytes_per_token_and_context_token"] for one in found["slopes"]}
    assert moved["q", 1] == moved["q", 2] == 0
    assert moved["kv", 2] > 100
    assert {row["bytes_per_token"] for row in rows if (row["form"], row["ranks"]) == ("q", 2)} == {
        4 * (2 * 4 * 8 + 4) * 2
    }
    assert len(found["plots"]) == 4


def test_decode_by_tensor_ranks() -> None:
    options = ["--contexts", "250", "--batches", "3", "--steps", "4", "--repeat", "1", "--share-cores"]
    rows = document("bench", "decode", *options, "--tensor", "1,2", "--random-model", TINY)["rows"]
    assert [(row["ranks"], row["tensor"]) for row in rows] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for row in rows:
        assert row["bytes_per_token"] == row["planned_bytes_per_token"]
        assert row["tensor_bytes_per_token"] == row["planned_tensor_bytes_per_token"]
        assert (row["tensor_bytes_per_token"] > 0) == (row["tensor"] > 1)


def test_kernels(tmp_path: Path) -> None:
    found = document(
        "bench", "kernels", "--sizes", "64", "--repeat", "1", "--budget", "0", "--plots", tmp_path
    )
    kernels = {row["kernel"] for row in found["rows"]}
    assert kernels == {
        "segment_attention",
        "paged_decode_partial",
        "merge_sampled",
        "merge_states",
        "csa_pack",
        "rope_append",
    }
    fields = {"device", "dtype", "form", "size", "seconds", "of_roofline", "times_torch"}
    assert all(fields <= set(row) for row in found["rows"])


def test_interference(tmp_path: Path) -> None:
    options = ["--batch", "2", "--context", "64", "--long", "1k", "--rounds", "1", "--chunks", "256"]
    options += ["--control-mib", "64", "--random-model", TINY]
    found = document("bench", "interference", *options, "--plots", tmp_path)
    rows = {(row["program"], row["disturbance"]): row for row in found["rows"]}
    assert set(rows) == {
        *(("sps2", what) for what in ("prefill", "quiet", "control")),
        *(("sarathi", what) for what in ("prefill", "quiet")),
    }
    for (_, disturbance), row in rows.items():
        assert 0 < row["tbt_p50_s"] <= row["tbt_p99_s"] <= row["tbt_longest_s"]
        assert (row["ttft_s"] is not None) == (disturbance == "prefill")
        assert row["num_gaps"] > 0
    assert {"p50", "mean", "p99"} <= set(found["beyond_control"])
    written = json.loads((tmp_path / "interference.json").read_text())
    assert written["rows"] == found["rows"]


def test_accuracy(tmp_path: Path) -> None:
    model = make_fact_model(tmp_path / "model")
    options = ["--tokens", "60", "--lengths", "256", "--continuation", "30", "--facts", "2", "--tail", "8"]
    found = document("eval", "accuracy", "--model", model, *options, "--plots", tmp_path / "plots")
    assert (found["scored_tokens"], found["prompts"]) == (60, 2)
    assert found["questions"] == {"one_hop": 4, "two_hops": 2}
    names = [one["name"] for one in found["profiles"]]
    assert {"exact", "paper", "local-t8-s0"} <= set(names)
    assert len(names) >= 12
    for one in found["profiles"]:
        assert {"value", "low", "high"} == set(one["perplexity_loss"])
        assert {"perplexity", "retrieval", "beats_local"} == set(one["verdicts"])
    assert (tmp_path / "plots/accuracy.md").read_text().startswith("# Accuracy")


def test_usage_errors_come_through() -> None:
    result = sps2("bench", "prefill", "--lengths", "no")
    assert result.returncode == 2
    assert result.stdout == ""
    assert "Error" in result.stderr
