"""Requests whose prompts begin alike hold that beginning once, and answer as they do alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from sps2_client import Client
from sps2_layout.profile_file import load_profile
from sps2_layout.profiles import EXACT
from support.deployment import DEMO_MODEL, LocalDeployment, deployment
from support.faults import Target, Victim
from support.preemption import write_profile
from support.prefix_sharing import Sharing, prompts_alike
from support.streams import Asked

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

COMMON = 640
"""A whole number of blocks, over both ranks."""
SHORTER, LONGER = 320, 380
"""New tokens: the first request ends while the others go on, later than its blocks are heard of."""
RECOVERED_S = 60.0


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_profile(tmp_path_factory.mktemp("profiles"))


@pytest.fixture(scope="module")
def running(profile: Path) -> Iterator[LocalDeployment]:
    arguments = ["--profile", str(profile), "--threads", "1", "--debug-invariants"]
    with deployment(DEMO_MODEL, arguments=arguments) as one:
        yield one


@pytest.fixture
def client(running: LocalDeployment) -> Iterator[Client]:
    with running.client() as one:
        yield one


def test_exact_prompts_share_what_they_have_in_common(running: LocalDeployment, client: Client) -> None:
    """One with a tail of its own and sampled, one of nothing but the beginning, of which nothing is sent."""
    sharing = Sharing(running, client, EXACT)
    one, other, no_more = prompts_alike(COMMON, [30, 250, 0])
    others = [Asked(other, LONGER, 7), Asked(no_more, LONGER, None)]
    sharing.check(Asked(one, SHORTER, None), others, COMMON)
    sharing.check(Asked(one, SHORTER, None), others[:1], COMMON, abort_first=True)
    sharing.tally.check()


def test_choices_of_a_request_share_with_others(running: LocalDeployment, client: Client) -> None:
    sharing = Sharing(running, client, EXACT)
    one, other = prompts_alike(COMMON, [40, 50])
    sharing.check(Asked(one, SHORTER, 3, num_choices=2), [Asked(other, LONGER, 4, num_choices=3)], COMMON)
    sharing.tally.check()


def test_csa_prompts_share_under_one_mask_only(
    running: LocalDeployment, client: Client, profile: Path
) -> None:
    """The mask of a prompt depends on its length."""
    sharing = Sharing(running, client, load_profile(str(profile)))
    one, other, third, longer = prompts_alike(COMMON, [100, 100, 100, 300])
    sharing.check(Asked(one, SHORTER, None), [Asked(other, LONGER, None), Asked(third, LONGER, 5)], COMMON)
    sharing.check(Asked(one, SHORTER, None), [Asked(longer, LONGER, None)], 0)
    sharing.tally.check()


def test_a_rank_dies_that_holds_shared_blocks(running: LocalDeployment, client: Client) -> None:
    sharing = Sharing(running, client, EXACT)
    one, other = prompts_alike(COMMON, [30, 250])
    sharing.survive(Asked(one, 400, None), Asked(other, 400, 7), Victim("decode-0/1", "engine"))
    sharing.tally.check()
    Target(running).settled(RECOVERED_S)
