"""Must show 1: bytes of a generated token, by real runs on 2 and 4 ranks, beside a run that moves KV instead.

Counted, not timed: the ranks may share cores. Rows and plots go to `.out/decode/bytes`.
"""

from pathlib import Path

import pytest

from support.bench import Row, sps2_json
from support.must_show import MustShow

pytestmark = pytest.mark.acceptance

K = 1024
CONTEXTS = (K, 4 * K, 16 * K, 64 * K)
RANKS = (2, 4)
HEADS, KV_HEADS, HEAD_DIM, LAYERS, ELEMENT = 8, 2, 32, 2, 4
MODEL = f"hidden=128,intermediate=256,layers={LAYERS},heads={HEADS},kv_heads={KV_HEADS},head_dim={HEAD_DIM},vocab=256"
TIMEOUT_S = 1_200


@pytest.fixture(scope="module")
def document(repo_root: Path) -> dict[str, list[Row]]:
    """Both ways of moving, one row that decodes."""
    options: list[str | Path] = [
        "--contexts",
        ",".join(map(str, CONTEXTS)),
        "--batches",
        "1",
        "--move",
        "q,kv",
    ]
    options += ["--ranks", ",".join(map(str, RANKS)), "--steps", "4", "--repeat", "1", "--share-cores"]
    options += ["--random-model", MODEL, "--plots", repo_root / ".out" / "decode" / "bytes"]
    return sps2_json("bench", "decode", *options, timeout_s=TIMEOUT_S)


def per_layer(document: dict[str, list[Row]], form: str, ranks: int) -> list[float]:
    """Bytes per generated token and layer, by context."""
    rows = [row for row in document["rows"] if (row["form"], row["ranks"]) == (form, ranks)]
    assert [row["context"] for row in rows] == list(CONTEXTS)
    return [row["bytes_per_token"] / LAYERS for row in rows]


def slope(document: dict[str, list[Row]], form: str, ranks: int) -> float:
    """Bytes per generated token and layer for each token of context."""
    (one,) = [one for one in document["slopes"] if (one["form"], one["ranks"]) == (form, ranks)]
    return float(one["bytes_per_token_and_context_token"]) / LAYERS


@pytest.mark.parametrize("ranks", RANKS)
def test_moving_q_is_the_closed_form_at_every_context(
    must_show: MustShow, document: dict[str, list[Row]], ranks: int
) -> None:
    with must_show(f"1 bytes: decode 1x{ranks}, Q moves") as figures:
        closed_form = (ranks - 1) * HEADS * (2 * ELEMENT * HEAD_DIM + 4)
        assert per_layer(document, "q", ranks) == [closed_form] * len(CONTEXTS)
        figures.append(f"{closed_form:,} = (h-1) Hq (2bd+4) bytes per token and layer from 1k to 64k")
        assert abs(slope(document, "q", ranks)) < 1e-9
        figures.append("slope 0")


@pytest.mark.parametrize("ranks", RANKS)
def test_moving_kv_grows_with_the_context(
    must_show: MustShow, document: dict[str, list[Row]], ranks: int
) -> None:
    with must_show(f"1 bytes: decode 1x{ranks}, KV moves (benchmark only)") as figures:
        away = (ranks - 1) / ranks
        expected = [2 * KV_HEADS * HEAD_DIM * ELEMENT * away * context for context in CONTEXTS]
        moved = per_layer(document, "kv", ranks)
        assert moved == expected
        figures.append(
            ", ".join(f"{one:,.0f}" for one in moved) + " bytes per token and layer at 1k, 4k, 16k, 64k"
        )
        figures.append(f"slope {slope(document, 'kv', ranks):.0f}")
        times = moved[-1] / per_layer(document, "q", ranks)[-1]
        figures.append(f"{times:,.0f} x Q at 64k")
