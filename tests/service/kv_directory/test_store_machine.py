"""The directory in random order, with faults; and that the machine notices when a fence is missing."""

import pytest

from sps2_service.lease_fence import LeaseFence
from support.directory_machine import FaultyRunner, run_machine
from support.redis_server import RedisServer

pytestmark = [pytest.mark.service, pytest.mark.timeout(180)]

RUNS, STEPS = 10, 30


def test_the_store_does_what_the_model_does(redis_server: RedisServer) -> None:
    assert run_machine(redis_server.url, RUNS, STEPS) >= RUNS


def test_a_worker_without_a_fence_is_noticed(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LeaseFence, "holds", lambda fence, _now: fence.holds_until > 0)
    with pytest.raises(AssertionError, match="acts after its lease has ended"):
        run_machine(redis_server.url, 10 * RUNS, STEPS, shrink=False)


@pytest.mark.parametrize(
    ("script", "piece", "instead"),
    [
        ("record_shards", "then return STALE end", "then end"),
        ("draw_epoch", "drawn + 1", "0"),
    ],
)
def test_a_store_without_a_fence_is_noticed(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, script: str, piece: str, instead: str
) -> None:
    monkeypatch.setattr(FaultyRunner, "edits", {script: (piece, instead)})
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run_machine(redis_server.url, 10 * RUNS, STEPS, shrink=False)
