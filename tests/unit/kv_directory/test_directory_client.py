"""The client's loops against a directory that answers as the test tells it."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from sps2.internal.v1 import kv_directory_service_pb2 as pb
from sps2.internal.v1.placement_pb2 import Attempt
from sps2.v1.cluster_pb2 import WORKER_STATE_DRAINING, WORKER_STATE_READY
from sps2_service.directory_client import DirectoryClient, DirectoryOptions, Standing
from sps2_service.directory_recorder import Recorder
from sps2_service.directory_rpc import pauses
from sps2_service.errors import Aborted, DeadlineExceeded, NotFound, Unavailable
from sps2_service.lease_fence import LeaseFence
from support.directory import make_record, make_worker
from support.scripted_directory import OPTIONS, ScriptedDirectory, end, until_calls


@pytest.fixture
async def scripted() -> AsyncGenerator[tuple[ScriptedDirectory, DirectoryClient]]:
    directory = ScriptedDirectory()
    async with directory.serving() as address, DirectoryClient(address, OPTIONS) as client:
        yield directory, client


Scripted = tuple[ScriptedDirectory, DirectoryClient]


async def test_a_lease_that_is_gone_is_registered_anew(scripted: Scripted) -> None:
    directory, client = scripted
    directory.statuses = [pb.LEASE_STATUS_RENEWED, pb.LEASE_STATUS_NOT_FOUND]
    task = asyncio.create_task(client.keep_registered(make_worker))
    assert await until_calls(directory, 5) == ["register", "renewed", "not_found", "register", "renewed"]
    await end(task)


async def test_degraded_is_borne_and_counts_as_contact(scripted: Scripted) -> None:
    directory, client = scripted
    directory.statuses = [pb.LEASE_STATUS_DEGRADED] * 3
    registration = client.registration(make_worker)
    task = asyncio.create_task(registration.run())
    await until_calls(directory, 2)
    first = registration.last_contact
    assert first is not None
    calls = await until_calls(directory, 5)
    assert calls == ["register", "degraded", "degraded", "degraded", "renewed"]
    assert registration.last_contact is not None
    assert registration.last_contact > first
    await end(task)


async def test_the_fence_holds_from_heartbeat_to_heartbeat(scripted: Scripted) -> None:
    directory, client = scripted
    directory.statuses = [pb.LEASE_STATUS_DEGRADED, pb.LEASE_STATUS_NOT_FOUND]
    registration, seen = client.registration(make_worker), []
    registration.on_fence = lambda holds_until: seen.append(holds_until - time.monotonic())
    assert not registration.fence.holds(time.monotonic())  # never registered
    task = asyncio.create_task(registration.run())
    await until_calls(directory, 5)
    await end(task)
    granted, degraded, lost, again = seen[:4]
    assert lost == -math.inf
    for left in (granted, degraded, again):
        assert 0 < left <= 3.0  # of the 5 s that the directory has granted
    last = registration.fence.holds_until
    assert registration.fence.holds(last - 0.001)
    assert not registration.fence.holds(last)


async def test_an_engine_that_is_lost_while_the_store_is_away_costs_no_lease(scripted: Scripted) -> None:
    directory, client = scripted
    worker = make_worker()
    registration = client.registration(lambda: worker)
    task = asyncio.create_task(registration.run())
    await until_calls(directory, 2)
    held = registration.fence.holds_until
    directory.refusals, directory.statuses = 1000, [pb.LEASE_STATUS_DEGRADED] * 1000
    worker = make_worker()
    worker.capabilities.kv_blocks_total = (
        1024  # what it can do changes when its engine is gone, or has loaded
    )
    begin = len(directory.calls)
    assert "degraded" in (await until_calls(directory, begin + 3))[begin:]
    assert registration.standing is Standing.DEGRADED
    assert registration.fence.holds_until > held
    directory.refusals, directory.statuses = 0, []  # the store is back
    begin = len(directory.calls)
    assert "register" in (await until_calls(directory, begin + 3))[begin:]
    await end(task)


def test_the_fence_counts_from_when_the_heartbeat_was_sent() -> None:
    fence = LeaseFence()
    fence.renew(sent_at=100.0, ttl_s=5.0)
    fence.renew(sent_at=99.0, ttl_s=5.0)  # an older one is no step back
    assert fence.holds_until == 103.0
    fence.lose()
    assert not fence.holds(0.0)


def test_degraded_keeps_a_lease_and_revives_none() -> None:
    fence = LeaseFence()
    fence.keep(sent_at=99.0, ttl_s=5.0)
    assert not fence.holds(99.0)  # there never was one
    fence.renew(sent_at=100.0, ttl_s=5.0)
    fence.keep(sent_at=102.9, ttl_s=5.0)
    assert fence.holds(105.8)
    fence.keep(sent_at=106.0, ttl_s=5.0)  # too late: it may have ended before the store went away
    assert not fence.holds(106.0)


async def test_what_is_recorded_is_told_again_with_each_registration(scripted: Scripted) -> None:
    directory, client = scripted
    client.record_shards(make_record("kept", 2))
    client.record_shards(make_record("gone"))
    client.release(Attempt(request_id="kept", number=1))  # an older attempt: the record stays
    client.release(Attempt(request_id="gone", number=1))
    await client.flush(5)
    directory.statuses = [pb.LEASE_STATUS_NOT_FOUND]
    task = asyncio.create_task(client.keep_registered(make_worker))
    await until_calls(directory, 4)
    await end(task)
    await client.flush(5)
    assert Counter(directory.recorded) == {"kept": 3, "gone": 1}


async def test_stale_ends_it_with_the_callback(scripted: Scripted) -> None:
    directory, client = scripted
    directory.statuses = [pb.LEASE_STATUS_STALE]
    told: list[bool] = []
    registration = client.registration(make_worker, on_stale=lambda: told.append(True))
    await asyncio.wait_for(registration.run(), 5)
    assert (told, registration.standing, directory.calls) == ([True], Standing.STALE, ["register", "stale"])


async def test_an_unwilling_directory_is_asked_again(scripted: Scripted) -> None:
    directory, client = scripted
    directory.refusals = 4
    task = asyncio.create_task(client.keep_registered(make_worker))
    assert await until_calls(directory, 2) == ["register", "renewed"]
    await end(task)


async def test_heartbeats_carry_the_state_of_their_moment(scripted: Scripted) -> None:
    directory, client = scripted
    worker = make_worker()
    task = asyncio.create_task(client.keep_registered(lambda: worker))
    await until_calls(directory, 2)
    worker = make_worker(state=WORKER_STATE_DRAINING)
    await until_calls(directory, len(directory.calls) + 3)
    assert (directory.states[0], directory.states[-1]) == (WORKER_STATE_READY, WORKER_STATE_DRAINING)
    await end(task)


def snapshot(revision: int, *worker_ids: str) -> pb.WatchWorkersResponse:
    workers = [make_worker(worker_id) for worker_id in worker_ids]
    return pb.WatchWorkersResponse(revision=revision, snapshot=pb.WorkerSnapshot(workers=workers))


def update(revision: int, worker_id: str) -> pb.WatchWorkersResponse:
    return pb.WatchWorkersResponse(revision=revision, updated=make_worker(worker_id))


@pytest.mark.parametrize("gap", [[update(1, "b/0")], [snapshot(4, "a/0"), update(6, "b/0")]])
async def test_a_gap_ends_a_watch(scripted: Scripted, gap: list[pb.WatchWorkersResponse]) -> None:
    directory, client = scripted
    directory.watches = [gap]
    with pytest.raises(Aborted):
        async for _ in client.watch_workers():
            pass


async def test_a_silent_watch_is_given_up(scripted: Scripted) -> None:
    _, client = scripted
    with pytest.raises(DeadlineExceeded):
        await anext(client.watch_workers())


async def test_a_view_follows_changes_and_starts_over_after_a_gap(scripted: Scripted) -> None:
    directory, client = scripted
    removal = pb.WatchWorkersResponse(revision=6, removed_worker_id="a/0")
    directory.watches = [
        [snapshot(4, "a/0"), update(5, "b/0"), removal, update(9, "x/0")],
        [snapshot(2, "c/0"), snapshot(1, "d/0"), update(2, "e/0")],
    ]
    membership = client.membership()
    seen: list[list[str]] = []

    def record(workers: Any) -> bool:
        seen.append(sorted(workers))
        return set(workers) == {"d/0", "e/0"}

    task = asyncio.create_task(membership.run())
    await membership.wait_for(record, 5)
    assert (membership.connected, membership.revision) == (True, 2)
    assert ["x/0"] not in seen
    await end(task)


async def test_an_absent_directory_costs_nothing_but_the_record() -> None:
    async with DirectoryClient("127.0.0.1:1", OPTIONS) as client:
        assert await client.draw_epoch("g", 2**52) == 2**52 + 1
        assert not await client.deregister("a/0", "life-1")
        with pytest.raises(Unavailable):
            await client.locate("r")


async def test_the_recorder_keeps_the_order_of_a_request_and_drops_what_is_too_much() -> None:
    recorder, sent, gate = Recorder(max_queued=8), list[int](), asyncio.Event()

    async def send(number: int) -> None:
        await gate.wait()
        sent.append(number)
        if number == 1:
            raise Unavailable("STORE_AWAY", "not now")
        if number == 2:
            raise NotFound("UNKNOWN_REQUEST", "expired")

    for number in range(5):  # a lane holds two
        recorder.submit("r", lambda number=number: send(number))  # type: ignore[misc]
    assert recorder.num_dropped == 3
    gate.set()
    await recorder.flush(5)
    assert (sent, recorder.num_dropped) == ([0, 1], 4)
    recorder.submit("r", lambda: send(2))
    await recorder.flush(5)
    assert (sent, recorder.num_dropped) == ([0, 1, 2], 4)
    await recorder.close()


def test_pauses_double_up_to_their_limit() -> None:
    paces = pauses(DirectoryOptions(retry_min_s=0.1, retry_max_s=1.0))
    for expected in (0.1, 0.2, 0.4, 0.8, 1.0, 1.0):
        assert next(paces) == pytest.approx(expected, rel=0.26)


async def test_who_gives_its_lease_back_takes_no_new_one(scripted: Scripted) -> None:
    directory, client = scripted
    registration = client.registration(make_worker)
    task = asyncio.create_task(registration.run())
    await until_calls(directory, 3)
    await registration.end()
    before = len(directory.calls)
    registration.renew_now()
    await asyncio.sleep(5 * OPTIONS.renew_interval_s)
    assert len(directory.calls) == before
    assert not task.done(), "it is its caller's to end"
    await end(task)
