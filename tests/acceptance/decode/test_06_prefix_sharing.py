"""Point 6: prefix sharing inside a group. Equal (chain hash, layout) is held once, and nobody reads another's KV."""

from pathlib import Path

import pytest

from sps2_layout.profile_file import load_profile
from sps2_layout.profiles import EXACT
from support.deployment import DEMO_MODEL, deployment
from support.faults import Target, Victim
from support.must_show import MustShow
from support.preemption import crowd, tight, write_profile
from support.prefix_sharing import Sharing, num_sharing, prompts_alike
from support.streams import Asked

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(1800)]

COMMON = 6_016
"""A whole number of blocks."""
FIRST_TOKENS, SECOND_TOKENS = 150, 300
FAULT_TOKENS = 800
"""The first must still decode when the second has been prefilled and the rank dies."""
RECOVERED_S = 60.0
CROWD = 12
CROWD_COMMON = 640


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_profile(tmp_path_factory.mktemp("profiles"))


@pytest.mark.parametrize("decode", ["1x1", "1x2", "1x3"])
def test_two_requests_with_the_same_beginning(profile: Path, decode: str, must_show: MustShow) -> None:
    short, long, longer = prompts_alike(COMMON, [20, 500, 500])
    one, other, third = (
        Asked(short, FIRST_TOKENS, None),
        Asked(long, SECOND_TOKENS, 3),
        Asked(longer, 300, None),
    )
    arguments = ["--profile", str(profile), "--threads", "1", "--debug-invariants"]
    with (
        deployment(DEMO_MODEL, "1x2", decode, arguments) as running,
        running.client() as client,
    ):
        exact, sparse = Sharing(running, client, EXACT), Sharing(running, client, load_profile(str(profile)))
        with must_show(f"6 decode {decode}: {COMMON:,} tokens in common, exact") as figures:
            figures.append(exact.check(one, [other], COMMON))
            figures.append("the first is aborted: " + exact.check(one, [other], COMMON, abort_first=True))
        with must_show(f"6 decode {decode}: three at once, and one of three choices") as figures:
            figures.append(exact.check(one, [other, third], COMMON))
            choices = Asked(long, SECOND_TOKENS, 8, num_choices=3)
            figures.append("choices: " + exact.check(one, [choices], COMMON))
        with must_show(f"6 decode {decode}: the same prompt, of whole blocks alone") as figures:
            whole = short[:COMMON]
            figures.append(exact.check(Asked(whole, FIRST_TOKENS, None), [Asked(whole, 300, 5)], COMMON))
        with must_show(f"6 decode {decode}: CSA, masks equal") as figures:
            figures.append(sparse.check(Asked(long, FIRST_TOKENS, 3), [third], COMMON))
        with must_show(f"6 decode {decode}: CSA, masks differ: nothing shared") as figures:
            figures.append(sparse.check(one, [third], 0))
        with must_show(f"6 decode {decode}: a rank dies that holds shared blocks") as figures:
            exact.survive(Asked(short, FAULT_TOKENS, None), other, Victim("decode-0/0", "engine"))
            figures.append(f"both streams went on; in all {exact.tally}; CSA {sparse.tally}")
            exact.tally.check()
            sparse.tally.check()
            Target(running).settled(RECOVERED_S)


@pytest.mark.parametrize(("decode", "kv_tokens"), [("1x1", 3_072), ("1x2", 1_536)])
@pytest.mark.parametrize("sparse", [False, True], ids=["exact", "csa"])
def test_a_pool_too_small_for_prompts_alike(
    profile: Path, decode: str, kv_tokens: int, must_show: MustShow, *, sparse: bool
) -> None:
    """Under CSA those of one length share; who shares is preempted and comes back like any other."""
    name = str(profile) if sparse else "exact"
    prompts = prompts_alike(CROWD_COMMON, [10 + 100 * (index % 3) for index in range(CROWD)])
    requests = [
        Asked(prompt, 200 + 10 * index, index if index % 2 else None) for index, prompt in enumerate(prompts)
    ]
    with must_show(f"6 {CROWD} streams that begin alike, decode {decode}, {Path(name).stem}") as figures:
        with tight(name, decode, kv_tokens) as running, running.client() as client:
            outcome = crowd(running, client, load_profile(name), requests)
            shared = num_sharing(running)
        figures += [f"{outcome.num_preemptions} preemptions, {shared} attempts shared", str(outcome.tally)]
        outcome.tally.check()
        assert outcome.num_preemptions > 0, "there was room for all"
        assert shared > 0
