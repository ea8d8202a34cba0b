"""Must show 6: peak memory of a rank grows linearly with its share of the prompt; 256k tokens complete."""

from itertools import pairwise

import pytest

from support.bench import Row, find, sps2_json
from support.must_show import MustShow

pytestmark = pytest.mark.acceptance

MIB = 1024 * 1024
K = 1024
LENGTHS = (32 * K, 64 * K, 128 * K)
SPREAD = 1.25
SHAPE = "hidden=256,intermediate=704,layers=4,heads=4,kv_heads=2"
TIMEOUT_S = 3 * 3_600


def grown(row: Row) -> float:
    """Bytes above the loaded model."""
    return float(row["peak_rss"] - row["rss_before"])


def rows_of(lengths: str, profiles: str, ranks: str) -> list[Row]:
    options = ["--lengths", lengths, "--profiles", profiles, "--ranks", ranks, "--repeat", "1"]
    document = sps2_json("bench", "prefill", *options, "--random-model", SHAPE, timeout_s=TIMEOUT_S)
    rows: list[Row] = document["rows"]
    return rows


def test_linear_in_tokens_per_rank(must_show: MustShow) -> None:
    with must_show("6 memory: linear in S / P") as figures:
        rows = rows_of("32k,64k,128k", "paper,default", "1,2")
        for profile in ("paper", "default"):
            for ranks in (1, 2):
                peaks = [grown(find(rows, length=s, profile=profile, ranks=ranks)) for s in LENGTHS]
                text = ", ".join(f"{peak / MIB:.0f}" for peak in peaks)
                figures.append(f"{profile} on {ranks}: {text} MiB at 32k, 64k, 128k")
                # Twice the tokens, twice the memory: neither a square term nor a hidden copy of the prompt.
                assert all(2 / SPREAD <= more / less <= 2 * SPREAD for less, more in pairwise(peaks))
            alone, shared = (find(rows, length=LENGTHS[-1], profile=profile, ranks=n) for n in (1, 2))
            figures.append(f"two ranks need {grown(shared) / grown(alone):.2f} of one's")
            assert grown(shared) <= SPREAD * grown(alone) / 2


def test_256k_tokens_complete(must_show: MustShow) -> None:
    with must_show("6 memory: 256k tokens, hidden 256, 4 layers") as figures:
        (row,) = rows_of("256k", "default", "2")
        figures.append(f"peak {row['peak_rss'] / MIB:.0f} MiB per rank, {row['ttft_s']:.0f} s")
        assert row["length"] == 256 * K
