"""Must show 4: time to first token of one run, side by side with exact attention and with transformers.

Needs two cores of its own; figures are ratios within the run, never seconds.
"""

from pathlib import Path
from typing import Any

import pytest

from support.bench import Row, find, sps2_json
from support.must_show import MustShow

pytestmark = pytest.mark.acceptance

LENGTHS = "2k,8k,16k,32k,64k"
K = 1024
TIMEOUT_S = 3 * 3_600
OF_FLOOR = 0.85


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    plots = tmp_path_factory.mktemp("ttft")
    options: list[str | Path] = [
        "--lengths",
        LENGTHS,
        "--ranks",
        "1,2",
        "--baselines",
        "transformers",
        "--plots",
        plots,
    ]
    return rows_of(options)


@pytest.fixture(scope="module")
def bf16() -> list[Row]:
    """fp32 transformers beside bf16 prefill, in one run."""
    return rows_of(["--lengths", "16k,32k", "--ranks", "2", "--dtype", "bf16", "--baselines", "transformers"])


def rows_of(options: list[str | Path]) -> list[Row]:
    document: dict[str, Any] = sps2_json("bench", "prefill", *options, timeout_s=TIMEOUT_S)
    rows: list[Row] = document["rows"]
    return rows


def ratio(slower: Row, faster: Row) -> float:
    return float(slower["ttft_s"] / faster["ttft_s"])


def test_exact_tokens_are_the_same(must_show: MustShow, fp32: list[Row]) -> None:
    with must_show("4 ttft: exact prefill's token is that of transformers") as figures:
        for length in sorted({row["length"] for row in fp32}):
            rows = [row for row in fp32 if (row["length"], row["profile"]) == (length, "exact")]
            assert len({row["token_id"] for row in rows}) == 1
            figures.append(f"{length}: {len(rows)} programs agree")


@pytest.mark.parametrize("length", [8 * K, 16 * K, 32 * K, 64 * K])
def test_price_of_the_system(must_show: MustShow, fp32: list[Row], length: int) -> None:
    with must_show(f"4 ttft: exact on 2 ranks at {length // K}k") as figures:
        two = find(fp32, length=length, program="sps2", profile="exact", ranks=2)
        one = find(fp32, length=length, program="sps2", profile="exact", ranks=1)
        peer = find(fp32, length=length, program="transformers")
        figures.append(f"{ratio(two, one):.3f} x one process with 2 threads (at most 1.10)")
        figures.append(f"transformers {ratio(peer, two):.2f} x slower (at least 1)")
        assert one["threads"] == 2
        assert ratio(two, one) <= 1.10
        assert ratio(peer, two) >= 1.0


@pytest.mark.parametrize(
    ("length", "profile", "least"),
    [(32 * K, "paper", 3.5), (32 * K, "default", 2.6), (64 * K, "paper", 6.0), (64 * K, "default", 3.6)],
)
def test_speed_up(must_show: MustShow, fp32: list[Row], length: int, profile: str, least: float) -> None:
    with must_show(f"4 ttft: {profile} at {length // K}k") as figures:
        row = find(fp32, length=length, program="sps2", profile=profile, ranks=2)
        share = row["speedup"] / row["floor_speedup"]
        figures.append(f"{row['speedup']:.2f} x faster than exact (at least {least})")
        figures.append(f"FLOP floor {row['floor_speedup']:.2f}, {share:.0%} of it (at least {OF_FLOOR:.0%})")
        assert row["speedup"] >= least
        assert share >= OF_FLOOR


@pytest.mark.parametrize(
    ("length", "profile", "least"),
    [(16 * K, "exact", 2.3), (32 * K, "exact", 2.3), (32 * K, "default", 7.0), (32 * K, "paper", 10.0)],
)
def test_bf16(must_show: MustShow, bf16: list[Row], length: int, profile: str, least: float) -> None:
    with must_show(f"4 ttft: bf16 {profile} at {length // K}k") as figures:
        row = find(bf16, length=length, program="sps2", profile=profile)
        faster = ratio(find(bf16, length=length, program="transformers"), row)
        figures.append(f"{faster:.2f} x faster than transformers fp32 (at least {least})")
        assert faster >= least
