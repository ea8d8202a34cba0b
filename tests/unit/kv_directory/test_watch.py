"""Watchers get everything in order, or are cut."""

import asyncio
from contextlib import aclosing

import pytest

from sps2.internal.v1.kv_directory_service_pb2 import WatchWorkersResponse, WorkerSnapshot
from sps2_kv_directory.watch import WatchHub
from sps2_service.errors import Unavailable


def snapshot() -> WatchWorkersResponse:
    return WatchWorkersResponse(revision=10, snapshot=WorkerSnapshot())


def change(revision: int) -> WatchWorkersResponse:
    return WatchWorkersResponse(revision=revision, removed_worker_id="x")


async def test_a_snapshot_then_every_change_to_every_watcher() -> None:
    hub = WatchHub(max_queued=8)
    one, other = hub.watch(snapshot), hub.watch(snapshot)
    assert [await anext(one), await anext(other)] == [snapshot(), snapshot()]
    late = asyncio.ensure_future(anext(other))
    await asyncio.sleep(0)
    for revision in (11, 12):
        hub.publish(change(revision))
    assert [await anext(one), await anext(one)] == [change(11), change(12)]
    assert [await late, await anext(other)] == [change(11), change(12)]
    await one.aclose()
    assert hub.num_watchers == 1
    await other.aclose()
    assert hub.num_watchers == 0


async def test_a_slow_watcher_is_cut_and_the_others_are_not() -> None:
    hub = WatchHub(max_queued=2)
    async with aclosing(hub.watch(snapshot)) as slow, aclosing(hub.watch(snapshot)) as quick:
        await anext(slow)
        await anext(quick)
        for revision in (11, 12, 13):
            hub.publish(change(revision))
            assert await anext(quick) == change(revision)
        assert hub.num_watchers == 1
        with pytest.raises(Unavailable) as caught:
            await anext(slow)
        assert caught.value.reason == "WATCH_TOO_SLOW"
        hub.publish(change(14))
        assert await anext(quick) == change(14)


async def test_a_closed_hub_ends_watches_and_takes_no_more() -> None:
    hub = WatchHub(max_queued=2)
    watch = hub.watch(snapshot)
    await anext(watch)
    waiting = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0)
    hub.close()
    with pytest.raises(Unavailable):
        await waiting
    with pytest.raises(Unavailable):
        await anext(hub.watch(snapshot))
