"""Must show 7: serving with CSA equals one process under the same layout, at 1, 2 and 4 prefill ranks.

The one process is `support.csa_oracle`: the schedule on a rank of its own, no blocks, no exchange; that the schedule is
the mask is must show 1.
"""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from sps2_layout.profiles import DEFAULT
from support.csa_oracle import check_csa, csa_tokens, long_prompts
from support.deployment import DEMO_MODEL, deployment
from support.identity import Prompt, Tally
from support.must_show import MustShow
from support.streams import wait_for_free_kv

pytestmark = pytest.mark.acceptance

LENGTHS = (500, 9_000, 40_000)
NUM_TOKENS = 32
TOGETHER_S = 60.0


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_mixed_prompts(must_show: MustShow, num_ranks: int) -> None:
    """All at once, then each alone."""
    with must_show(
        f"7 `sps2 up --profile default`, prompts of {LENGTHS}, {num_ranks} prefill ranks"
    ) as figures:
        prompts, tally, barrier = long_prompts(LENGTHS), Tally(), Barrier(len(LENGTHS), timeout=TOGETHER_S)
        for prompt in prompts:
            csa_tokens(DEMO_MODEL, DEFAULT, prompt, NUM_TOKENS)  # kept: nothing else may compute meanwhile
        with (
            deployment(prefill=f"1x{num_ranks}", arguments=["--profile", "default"]) as running,
            running.client() as client,
        ):
            with ThreadPoolExecutor(len(prompts)) as pool:

                def ask(prompt: Prompt) -> list[str]:
                    barrier.wait()
                    return check_csa(client, DEMO_MODEL, DEFAULT, [prompt], NUM_TOKENS, tally)

                together = list(pool.map(ask, prompts))
            alone = check_csa(client, DEMO_MODEL, DEFAULT, prompts, NUM_TOKENS, tally)
            wait_for_free_kv(client)
        assert alone == [said for (said,) in together]
        figures += [str(tally), *alone]
        assert [said.split(" A=")[0] for said in alone] == ["exact", "default: N=2", "default: N=8"]
        tally.check()
