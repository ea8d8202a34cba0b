"""Requests whose prompts begin alike hold that beginning once, and answer as they do alone."""

from collections.abc import Iterator

import pytest

from sps2_client import Client
from support.deployment import DEMO_MODEL, LocalDeployment, deployment
from support.preemption import write_profile
from support.prefix_sharing import Sharing, prompts_alike
from support.streams import Asked

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

COMMON = 1_280
SHORTER, LONGER = 60, 100
"""New tokens: the first request ends while the second goes on."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalDeployment]:
    profile = write_profile(tmp_path_factory.mktemp("profiles"))
    arguments = ["--profile", str(profile), "--threads", "1", "--debug-invariants"]
    with deployment(DEMO_MODEL, arguments=arguments) as one:
        yield one


@pytest.fixture
def client(running: LocalDeployment) -> Iterator[Client]:
    with running.client() as one:
        yield one


def test_exact_prompts_share_what_they_have_in_common(running: LocalDeployment, client: Client) -> None:
    sharing = Sharing(running, client, "exact")
    one, other = prompts_alike(COMMON, [30, 250])
    sharing.check(Asked(one, SHORTER, None), Asked(other, LONGER, 7), COMMON)
    sharing.check(Asked(other, LONGER, 7), Asked(one, SHORTER, None), COMMON, abort_first=True)


def test_all_of_a_prompt_may_be_there(running: LocalDeployment, client: Client) -> None:
    """Its KV is whole blocks: nothing is sent."""
    (prompt,) = prompts_alike(COMMON, [0])
    sharing = Sharing(running, client, "exact")
    sharing.check(Asked(prompt, SHORTER, None), Asked(prompt, LONGER, None), COMMON)


def test_csa_prompts_share_under_one_mask_only(running: LocalDeployment, client: Client) -> None:
    """The mask of a prompt depends on its length."""
    sharing = Sharing(running, client, "")
    one, other, longer = prompts_alike(COMMON, [100, 100, 300])
    sharing.check(Asked(one, SHORTER, None), Asked(other, LONGER, None), COMMON)
    sharing.check(Asked(one, SHORTER, None), Asked(longer, LONGER, None), 0)
