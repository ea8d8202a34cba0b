"""A replica's copy of the worker state, over a store that says what the test tells it."""

from contextlib import aclosing
from typing import cast

import pytest

from sps2.internal.v1.kv_directory_service_pb2 import WatchWorkersResponse
from sps2.v1.cluster_pb2 import WorkerInfo
from sps2_kv_directory.membership import Membership
from sps2_kv_directory.store import Changes, Store, StoreState, WorkerChange
from sps2_kv_directory.watch import WatchHub
from sps2_service.errors import Unavailable
from support.directory import make_worker


def state(
    incarnation: str, revision: int, workers: list[WorkerInfo], *, recovering: bool = False
) -> StoreState:
    return StoreState(incarnation, f"{incarnation} log", revision, workers, 0, 0, recovering)


class FakeStore:
    """Holds what the next calls return."""

    def __init__(self) -> None:
        self.current = state("data-1", 5, [make_worker("decode-0/0"), make_worker("decode-0/1")])
        self.next_changes: list[WorkerChange] | None = []

    async def state(self) -> StoreState:
        return self.current

    async def changes(self, log: str, revision: int) -> Changes | None:
        if log != self.current.log or self.next_changes is None:
            return None
        return Changes(self.next_changes, self.current.recovering)


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def membership(store: FakeStore) -> Membership:
    return Membership(cast("Store", store), WatchHub(64), poll_interval_s=0.01)


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
        store.current, store.next_changes = state("data-1", 99, [make_worker("decode-7/0")]), None
        await membership.follow()
        again = await anext(watch)
        assert (again.revision, ids(again)) == (99, ["decode-7/0"])


async def test_workers_of_lost_data_are_held_until_the_directory_has_recovered(
    membership: Membership, store: FakeStore
) -> None:
    await membership.follow()
    async with aclosing(membership.watch()) as watch:
        await anext(watch)
        store.current = state("data-2", 0, [], recovering=True)
        await membership.follow()
        held = await anext(watch)
        assert (held.revision, ids(held)) == (0, ["decode-0/0", "decode-0/1"])
        assert held.snapshot.recovering
        back = make_worker("decode-0/1")
        store.next_changes = [WorkerChange(back, None)]
        await membership.follow()
        assert await anext(watch) == WatchWorkersResponse(revision=1, updated=back)
        store.next_changes = []
        await membership.follow()
        store.current = state("data-2", 1, [back])
        await membership.follow()
        after = await anext(watch)
        assert (after.revision, ids(after), after.snapshot.recovering) == (1, ["decode-0/1"], False)
