"""The directory in random order, with faults; and that the machine notices when a fence is missing."""

import pytest

from sps2_service.lease_fence import LeaseFence
from support.directory_machine import DirectoryMachine, FaultyRunner, run_machine
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


def test_degraded_lifts_no_fence(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker is silent until its lease has ended; then the store goes away, and all that it hears is DEGRADED."""
    silent_then_degraded(redis_server.url)
    monkeypatch.setattr(LeaseFence, "keep", LeaseFence.renew)
    with pytest.raises(AssertionError, match="acts after its lease has ended"):
        silent_then_degraded(redis_server.url)


def silent_then_degraded(url: str) -> None:
    DirectoryMachine.url = url
    machine = DirectoryMachine()
    try:
        machine.heartbeat(worker_id="prefill-0/0", which=-1, replica=0, lost=False)
        for _ in range(2):  # new data: nothing ends for the first TTL
            machine.time_passes(ticks=5, working=(0, 1))
        machine.begin_outage("store")
        machine.heartbeat(worker_id="prefill-0/0", which=-1, replica=0, lost=False)
        machine.who_believes_in_its_lease_has_one()
    finally:
        machine.teardown()


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
