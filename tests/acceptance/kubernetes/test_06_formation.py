"""To build 4: ranks find each other by what the objects tell them, and a lost one joins again under a later epoch."""

from collections.abc import Callable
from pathlib import Path

import pytest

from support.checkpoints import make_tiny_checkpoint
from support.directory import DirectoryProcess, start_directory
from support.formation import Start, group_of, lose_and_rejoin
from support.must_show import MustShow
from support.redis_server import RedisServer, redis_server

__all__ = ["redis_server", "start_directory"]

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(300)]


@pytest.mark.parametrize("placement", ["lws", "statefulset", "pod"])
@pytest.mark.parametrize("component", ["prefill", "decode"])
def test_groups_form_and_form_again(
    component: str,
    placement: str,
    processes: Start,
    redis_server: RedisServer,
    start_directory: Callable[..., DirectoryProcess],
    tmp_path: Path,
    must_show: MustShow,
) -> None:
    model = make_tiny_checkpoint(tmp_path / "tiny", "llama")
    group = group_of(processes, component, placement, model, start_directory(redis_server.url).address)
    with must_show(f"6 {component} ranks by {placement}") as figures:
        group.begin()
        epochs = [group.formed()]
        for rank, name in ((1, "follower"), (0, "leader")):
            epochs.append(lose_and_rejoin(group, rank))
            figures.append(f"{name} lost and back: the other engine lives on")
        assert epochs == sorted(set(epochs))
