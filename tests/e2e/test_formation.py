"""A group forms from what a LeaderWorkerSet tells its ranks, and forms again when a rank is lost and comes back.

Both pools are one code (`sps2_service.ranks`); all of pools, placements and ranks: `make acceptance SUITE=kubernetes`.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from support.checkpoints import make_tiny_checkpoint
from support.directory import DirectoryProcess, start_directory
from support.formation import Start, group_of, lose_and_rejoin
from support.redis_server import RedisServer, redis_server

__all__ = ["redis_server", "start_directory"]

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]


def test_a_lost_rank_joins_again_and_the_other_keeps_its_weights(
    processes: Start,
    redis_server: RedisServer,
    start_directory: Callable[..., DirectoryProcess],
    tmp_path: Path,
) -> None:
    model = make_tiny_checkpoint(tmp_path / "tiny", "llama")
    group = group_of(processes, "prefill", "lws", model, start_directory(redis_server.url).address)
    group.begin()
    first = group.formed()
    assert lose_and_rejoin(group, rank=1) > first
