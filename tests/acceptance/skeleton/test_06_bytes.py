"""Must show 6: posted bytes equal the plans' count exactly, and KV moves once."""

from pathlib import Path

import pytest

from sps2_engine.attention.cost_model import Exchange
from support.checkpoints import make_tiny_checkpoint
from support.deployment import DEMO_MODEL, deployment
from support.identity import book_prompts, byte_prompts
from support.must_show import MustShow
from support.traffic import Shape, check_bytes

pytestmark = pytest.mark.acceptance

LENGTHS = (1, 2, 63, 65, 300, 1_000, 4_000)
NUM_TOKENS = 17


def show(figures: list[str], folder: Path, total_kv: int, lengths: tuple[int, ...]) -> None:
    ratio = total_kv / sum(Shape.of(folder).least_kv(length) for length in lengths)
    figures.append(f"KV transfer {ratio:.4f} x the minimum")


@pytest.mark.parametrize("exchange", ["heads", "kv"])
@pytest.mark.parametrize(("prefill", "decode"), [(1, 1), (2, 2), (4, 3)])
def test_demo_model(must_show: MustShow, prefill: int, decode: int, exchange: Exchange) -> None:
    with must_show(f"6 bytes, demo model, (R, D) = ({prefill}, {decode}), {exchange}") as figures:
        with (
            deployment(
                prefill=f"1x{prefill}",
                decode=f"1x{decode}",
                arguments=["--exchange", exchange, "--sharing", "all"],
            ) as running,
            running.client() as client,
        ):
            prompts = book_prompts(LENGTHS)
            total = check_bytes(client, DEMO_MODEL, (prefill, decode), prompts, NUM_TOKENS, exchange)
        figures.append(f"posted = planned = usage: {total}")
        show(figures, DEMO_MODEL, total.kv_transfer, LENGTHS)


@pytest.mark.parametrize("transport", ["nixl", "grpc"])
def test_odd_heads(must_show: MustShow, tmp_path: Path, transport: str) -> None:
    with must_show(f"6 bytes, 14/2 heads, (R, D) = (3, 4), {transport}") as figures:
        folder = make_tiny_checkpoint(
            tmp_path / "odd", "qwen2", num_attention_heads=14, num_key_value_heads=2
        )
        arguments = ["--kv-transport", transport, "--exchange", "heads", "--sharing", "all"]
        with deployment(folder, "1x3", "1x4", arguments) as running, running.client() as client:
            total = check_bytes(client, folder, (3, 4), byte_prompts(LENGTHS), NUM_TOKENS, "heads")
        figures.append(f"posted = planned = usage: {total}")
        show(figures, folder, total.kv_transfer, LENGTHS)
