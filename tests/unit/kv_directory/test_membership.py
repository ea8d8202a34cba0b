"""A replica's copy of the worker state, over a store that says what the test tells it."""

import asyncio
from contextlib import aclosing
from typing import cast

import pytest

from sps2.internal.v1.kv_directory_service_pb2 import WatchWorkersResponse
from sps2_kv_directory.membership import Membership
from sps2_kv_directory.store import Store, StoreState, WorkerChange
from sps2_kv_directory.watch import WatchHub
from sps2_service.errors import Unavailable
from support.directory import make_worker


class FakeStore:
    """Holds what the next calls return."""

    def __init__(self) -> None:
        self.current = StoreState("data-1", 5, [make_worker("decode-0/0"), make_worker("decode-0/1")], 0)
        self.next_changes: list[WorkerChange] | None = []

    async def state(self) -> StoreState:
        return self.current

    async def changes(self, incarnation: str, revision: int) -> list[WorkerChange] | None:
        return self.next_changes if incarnation == self.current.incarnation else None


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def membership(store: FakeStore) -> Membership:
    return Membership(cast("Store", store), WatchHub(64), poll_interval_s=0.01, hold_s=0.2)


def ids(response: WatchWorkersResponse) -> list[str]:
    assert response.HasField("snapshot")
    return [worker.worker_id for worker in response.snapshot.workers]


async def test_nothing_is_served_before_the_store_was_read(membership: Membership) -> None:
    with pytest.raises(Unavailable):
        membership.watch()


async def test_changes_have_the_revisions_that_follow_the_snapshot(
    membership: Membership, store: FakeStore
) -> None:
    await membership.follow()
    async with aclosing(membership.watch()) as watch:
        first = await anext(watch)
        assert (first.revision, ids(first)) == (5, ["decode-0/0", "decode-0/1"])
        added = make_worker("decode-0/2")
        store.next_changes = [WorkerChange(added, None), WorkerChange(None, "decode-0/0")]
        await membership.follow()
        assert await anext(watch) == WatchWorkersResponse(revision=6, updated=added)
        assert await anext(watch) == WatchWorkersResponse(revision=7, removed_worker_id="decode-0/0")
    async with aclosing(membership.watch()) as watch:
        first = await anext(watch)
        assert (first.revision, ids(first)) == (7, ["decode-0/1", "decode-0/2"])


async def test_a_gap_in_the_log_is_a_new_snapshot(membership: Membership, store: FakeStore) -> None:
    await membership.follow()
    async with aclosing(membership.watch()) as watch:
        await anext(watch)
        store.current, store.next_changes = StoreState("data-1", 99, [make_worker("decode-7/0")], 0), None
        await membership.follow()
        again = await anext(watch)
        assert (again.revision, ids(again)) == (99, ["decode-7/0"])


async def test_workers_of_lost_data_are_held_until_they_had_time_to_return(
    membership: Membership, store: FakeStore
) -> None:
    await membership.follow()
    async with aclosing(membership.watch()) as watch:
        await anext(watch)
        store.current = StoreState("data-2", 0, [], 0)
        await membership.follow()
        held = await anext(watch)
        assert (held.revision, ids(held)) == (0, ["decode-0/0", "decode-0/1"])
        back = make_worker("decode-0/1")
        store.next_changes = [WorkerChange(back, None)]
        await membership.follow()
        assert await anext(watch) == WatchWorkersResponse(revision=1, updated=back)
        store.next_changes = []
        await asyncio.sleep(0.25)
        await membership.follow()
        after = await anext(watch)
        assert (after.revision, ids(after)) == (1, ["decode-0/1"])
