"""Must show 2: greedy tokens are identical to those of transformers `generate`."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest

from support import forgetful
from support.checkpoints import make_tiny_checkpoint
from support.deployment import DEMO_MODEL, deployment
from support.identity import Prompt, Tally, book_prompts, byte_prompts, check_greedy
from support.must_show import MustShow
from support.streams import wait_for_free_kv

pytestmark = pytest.mark.acceptance

NUM_TOKENS = 40
BOOK_LENGTHS = (1, 7, 500, 6_000)
BYTE_LENGTHS = (1, 3, 70, 500)
MESHES = tuple(itertools.product((1, 2, 4), (1, 2, 3)))
TINY_MESHES = ((1, 1), (2, 3), (4, 2))


def check_meshes(
    folder: Path, meshes: Sequence[tuple[int, int]], prompts: Sequence[Prompt], figures: list[str]
) -> None:
    """Each mesh of (prefill, decode) ranks in turn; the flips of all of them are bounded together."""
    tally = Tally()
    try:
        for prefill, decode in meshes:
            with (
                deployment(folder, f"1x{prefill}", f"1x{decode}") as running,
                running.client() as client,
            ):
                check_greedy(client, folder, prompts, NUM_TOKENS, tally)
                wait_for_free_kv(client)
    except BaseException:
        figures.append(f"failed with (R, D) = ({prefill}, {decode})")
        raise
    finally:
        figures.append(str(tally))
    tally.check()
    assert tally.num_compared >= len(meshes) * (len(prompts) - 1) * NUM_TOKENS
    figures.append(f"(R, D) in {', '.join(f'({r}, {d})' for r, d in meshes)}")


def test_demo_model(must_show: MustShow) -> None:
    with must_show(f"2 identity, demo model, prompts of {BOOK_LENGTHS} tokens") as figures:
        check_meshes(DEMO_MODEL, MESHES, book_prompts(BOOK_LENGTHS), figures)


@pytest.mark.parametrize(
    ("family", "heads"), [("llama", (4, 2)), ("mistral", (4, 1)), ("qwen2", (14, 2)), ("qwen3", (8, 2))]
)
def test_families(must_show: MustShow, tmp_path: Path, family: str, heads: tuple[int, int]) -> None:
    with must_show(f"2 identity, random {family} with {heads[0]}/{heads[1]} heads") as figures:
        folder = make_tiny_checkpoint(
            tmp_path / family,
            family,
            num_attention_heads=heads[0],
            num_key_value_heads=heads[1],
            max_shard_size="100KB",
        )
        check_meshes(folder, TINY_MESHES, byte_prompts(BYTE_LENGTHS), figures)


def test_a_lost_block_is_noticed(must_show: MustShow, tmp_path: Path) -> None:
    with must_show("2 identity breaks when one KV block is zeroed") as figures:
        folder = make_tiny_checkpoint(tmp_path / "llama", "llama")
        with (
            deployment(folder, "1x1", "1x1", program=forgetful.PROGRAM, env=forgetful.ENV) as running,
            running.client() as client,
            pytest.raises(AssertionError, match="top-2 gap") as caught,
        ):
            check_greedy(client, folder, byte_prompts([500]), NUM_TOKENS, Tally())
        figures.append(str(caught.value))
