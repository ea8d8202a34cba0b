"""Must show 3: a pool too small for all. Nothing deadlocks, nothing admitted fails, preempted streams go on exactly."""

from pathlib import Path

import pytest

from sps2_layout.profile_file import load_profile
from support.deployment import DEMO_MODEL, deployment
from support.faults import Target, Victim
from support.must_show import MustShow
from support.preemption import crowd, cut_and_compare, tight, write_profile
from support.streams import Asked, mixed_requests

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(1800)]

LENGTHS = (900, 64, 500, 300, 1_200, 5, 700, 300, 129, 400, 600, 1_000, 256, 30, 800, 350)
NUM_TOKENS = 300
ROUNDS = 2
RECOVERED_S = 60.0


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_profile(tmp_path_factory.mktemp("profiles"))


@pytest.mark.parametrize(("decode", "kv_tokens"), [("1x1", 2_560), ("1x2", 1_536), ("1x3", 1_024)])
@pytest.mark.parametrize("sparse", [False, True], ids=["exact", "csa"])
def test_a_pool_too_small_for_all(
    profile: Path, decode: str, kv_tokens: int, must_show: MustShow, *, sparse: bool
) -> None:
    name = str(profile) if sparse else "exact"
    requests = [Asked(one.prompt, NUM_TOKENS, one.seed) for one in mixed_requests(LENGTHS)]
    needed = sum(len(one.prompt) + one.num_tokens for one in requests)
    with must_show(f"3 {len(requests)} streams, decode {decode}, {'csa' if sparse else 'exact'}") as figures:
        figures.append(f"{needed:,} tokens of KV wanted, {int(decode[2:]) * kv_tokens:,} there")
        with tight(name, decode, kv_tokens) as running, running.client() as client:
            for _ in range(ROUNDS):
                outcome = crowd(running, client, load_profile(name), requests)
                figures += [f"{outcome.num_preemptions} preemptions", str(outcome.tally)]
                outcome.tally.check()
                assert outcome.num_preemptions > 0, "there was room for all"
        figures.append("all ended, 0 KV blocks used afterwards")


@pytest.mark.parametrize("sparse", [False, True], ids=["exact", "csa"])
def test_a_stream_goes_on_after_a_decode_rank_died(
    profile: Path, must_show: MustShow, *, sparse: bool
) -> None:
    name = str(profile) if sparse else "exact"
    greedy, sampled = (Asked(one.prompt, NUM_TOKENS, one.seed) for one in mixed_requests([1_200, 1_200]))
    with (
        must_show(
            f"3 kill -9 of each decode engine in mid-stream, {'csa' if sparse else 'exact'}"
        ) as figures,
        deployment(DEMO_MODEL, arguments=["--profile", name, "--threads", "1"]) as running,
        running.client() as client,
    ):
        one = Target(running)
        for rank in ("decode-0/0", "decode-0/1"):
            for asked in (greedy, sampled):
                tally = cut_and_compare(one, client, load_profile(name), asked, Victim(rank, "engine"))
                figures.append(f"{rank}: {tally}")
                tally.check()
                one.settled(RECOVERED_S)
