"""Must show 5: live resize 1 -> 4 -> 2 at 2k and 16k: tokens identical, gap <= 3 median TBTs, prefill FLOPs 0."""

from collections.abc import Sequence
from typing import TypeAlias

import pytest

from support.deployment import DEMO_MODEL, deployment
from support.identity import GENERATE_TIMEOUT_S, Tally, book_ids, reference
from support.must_show import MustShow
from support.oracle import compare
from support.resizing import answer_resized, prefill_slices, wait_for_counts
from support.streams import wait_for_free_kv

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(1800)]

Resize: TypeAlias = tuple[int, Sequence[int]]
"""Degree, and which ranks."""

NUM_TOKENS = 400
MOST_GAPS = 3.0
TO_ONE: Resize = (1, ())
"""Placed wide as its length pays for, it begins on one rank like this."""
DEGREES: list[Resize] = [(4, ()), (2, ()), (2, ())]
"""The last one moves nothing; it tells the pace after the one before."""


@pytest.mark.parametrize("length", [2_000, 16_000])
@pytest.mark.parametrize("away", [False, True], ids=["home-stays", "home-moves"])
def test_one_four_two(length: int, must_show: MustShow, *, away: bool) -> None:
    prompt = (book_ids() * (length // len(book_ids()) + 1))[:length]
    with (
        must_show(f"5 resize 1 -> 4 -> 2 at {length:,} tokens{', home moved' if away else ''}") as figures,
        deployment(DEMO_MODEL, "1x1", "1x4", ["--profile", "exact", "--threads", "1"]) as running,
        running.client() as client,
    ):
        alone = client.generate(
            token_ids=prompt, max_tokens=NUM_TOKENS, ignore_eos=True, timeout=GENERATE_TIMEOUT_S
        )
        before = prefill_slices(client)
        asked = [TO_ONE, *DEGREES]
        if away:
            # Which rank is home is not known before; of two pairs that share nothing it is outside one.
            asked = [TO_ONE, (4, ()), (2, (0, 1)), (2, (2, 3))]
        resized = answer_resized(client, prompt, NUM_TOKENS, asked)
        wait_for_counts(client, 3)
        wait_for_free_kv(client)

        assert [len(one.holders) for one in resized.resizes] == [1, 4, 2, 2]
        # A prompt takes as many slices whenever it comes: nothing more was prefilled.
        first = before
        assert prefill_slices(client) - before == first, "something was prefilled"
        figures.append("prefill slices during the resizes 0")
        tally = Tally()
        gaps = [float("inf")] * NUM_TOKENS
        if alone.token_ids != resized.token_ids:
            _, gaps = reference(DEMO_MODEL, prompt, NUM_TOKENS)
        tally.add(compare(resized.token_ids, alone.token_ids, gaps))
        figures.append(str(tally))
        tally.check()
        for one, after in zip(resized.resizes[1:], resized.resizes[2:], strict=False):
            # By the slower pace of the two between which it stands: on two cores exchanges among four ranks cost
            # more than what they save.
            usual = max(one.median_gap_s, after.median_gap_s)
            figures.append(
                f"to {len(one.holders)}: {one.num_blocks_moved} blocks, longest gap {one.longest_gap_s * 1e3:.1f} ms, "
                f"median {usual * 1e3:.1f} ms"
            )
            assert one.longest_gap_s <= MOST_GAPS * usual
