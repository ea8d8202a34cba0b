"""Streams go on where they stopped, token for token: after the death of a decode rank, and after preemption."""

from pathlib import Path

import pytest

from sps2_layout.profile_file import load_profile
from support.deployment import DEMO_MODEL, deployment
from support.faults import Target, Victim
from support.preemption import crowd, cut_and_compare, tight, write_profile
from support.prefix_sharing import num_sharing, prompts_alike
from support.streams import Asked, mixed_requests

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

RECOVERED_S = 60.0


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_profile(tmp_path_factory.mktemp("profiles"))


def test_a_stream_goes_on_exactly(profile: Path) -> None:
    """Sampled and sparse; greedy and dense ones: `test_faults`."""
    _, sampled = (Asked(one.prompt, 200, one.seed) for one in mixed_requests([700, 700]))
    arguments = ["--profile", str(profile), "--threads", "1"]
    with deployment(DEMO_MODEL, arguments=arguments) as running, running.client() as client:
        one = Target(running)
        cut_and_compare(
            one, client, load_profile(str(profile)), sampled, Victim("decode-0/1", "engine")
        ).check()
        one.settled(RECOVERED_S)


def test_a_pool_too_small_for_all(profile: Path) -> None:
    """1,024 tokens of KV for 5 streams of 2,370 tokens that begin alike, all but one under the same mask.

    Prefill takes a fraction of what 300 tokens take: the pool fills as the streams grow, however fast the machine is.
    Who comes back finds the beginning of its prompt with those that stayed.
    """
    prompts = prompts_alike(128, [2, 12, 162, 22, 32])
    requests = [Asked(prompt, 300, index if index % 2 else None) for index, prompt in enumerate(prompts)]
    with tight(str(profile), "1x2", 512) as running, running.client() as client:
        outcome = crowd(running, client, load_profile(str(profile)), requests)
        assert num_sharing(running) > 0
    outcome.tally.check()
    assert outcome.num_preemptions > 0
