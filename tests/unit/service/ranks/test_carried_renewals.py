"""A group's heartbeats: one call for all its ranks, and none is lost where that call is."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import pytest

from sps2.internal.v1 import engine_pb2, group_service_pb2
from sps2.internal.v1 import kv_directory_service_pb2 as pb
from sps2_service.directory_client import DirectoryClient, Registration, Standing
from sps2_service.directory_registration import renewal_of
from sps2_service.errors import Unavailable
from sps2_service.ranks.carried_renewals import CarriedRenewals, Outgoing
from sps2_service.ranks.follower import Follower
from sps2_service.ranks.group import GroupLeader
from sps2_service.ranks.group_servicer import GroupServicer
from sps2_service.server import ServiceServer
from support.directory import make_worker
from support.scripted_directory import OPTIONS, ScriptedDirectory, end

SERVICE = group_service_pb2.DESCRIPTOR.services_by_name["GroupService"]
SIZE = 3
EVERYBODY = [f"decode-0/{rank}" for rank in range(SIZE)]
TIMEOUT_S = 10.0
INTERVAL_S = 0.2
"""Followers wait half of it for a leader that is late, also on a busy machine."""


class Idle:
    """A coordinator without work, and an engine without a process."""

    def on_formed(self, epoch: int, ranks: list[engine_pb2.EngineLoaded]) -> None: ...
    def on_broken(self, error: Unavailable) -> None: ...
    def on_event(self, rank: int, event: engine_pb2.EngineEvent) -> None: ...
    def send(self, command: engine_pb2.EngineCommand) -> None: ...


class Group:
    """A leader and its followers, each with a lease of its own, over real gRPC."""

    def __init__(self, directory: ScriptedDirectory) -> None:
        self.directory = directory
        self.registrations: list[Registration] = []
        self.server = ServiceServer()

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():  # noqa: ASYNC110 - it comes over the wire
                await asyncio.sleep(0.005)

    async def until_carried(self) -> None:
        """Until the leader's call renews for everybody."""
        await self.until(lambda: self.directory.renewed and len(self.directory.renewed[-1]) == SIZE)
        assert sorted(self.directory.renewed[-1]) == EVERYBODY


async def draw_epoch(previous: int) -> int:
    return previous + 1


@asynccontextmanager
async def renewing(registration: Registration) -> AsyncGenerator[None]:
    task = asyncio.create_task(registration.run())
    try:
        yield
    finally:
        await end(task)


@pytest.fixture
async def group() -> AsyncGenerator[Group]:
    async with AsyncExitStack() as stack:
        directory = ScriptedDirectory()
        directory.renew_interval_s = INTERVAL_S
        address = await stack.enter_async_context(directory.serving())
        made, idle, carried = Group(directory), Idle(), CarriedRenewals()
        leader = GroupLeader("decode-0", SIZE, draw_epoch, idle, lambda: None)
        made.server.add(GroupServicer(leader, "hash", renewals=carried), SERVICE)
        at = await made.server.start("127.0.0.1:0")
        stack.push_async_callback(made.server.stop, 0)
        for rank, worker_id in enumerate(EVERYBODY):
            client = await stack.enter_async_context(DirectoryClient(address, OPTIONS))
            registration = client.registration(partial(make_worker, worker_id))
            made.registrations.append(registration)
            await stack.enter_async_context(renewing(registration))
            if rank == 0:
                registration.collect = carried.collect
                continue
            hello = group_service_pb2.FollowerHello(
                group="decode-0", rank=rank, group_size=SIZE, model_hash="hash", tensor_ranks=1
            )
            follower = Follower(hello, at, worker_id, registration, lambda: None, None)
            follower.attach(idle)  # type: ignore[arg-type]
            running = asyncio.create_task(follower.run())
            stack.push_async_callback(end, running)
        yield made


async def test_one_call_renews_for_a_group(group: Group) -> None:
    await group.until_carried()
    begin = len(group.directory.renewed)
    await group.until(lambda: len(group.directory.renewed) >= begin + 5)
    calls = group.directory.renewed[begin:]
    assert sum(len(call) == SIZE for call in calls) >= len(calls) - 1  # a follower may be late once
    now = time.monotonic()
    assert all(one.standing is Standing.REGISTERED and one.fence.holds(now) for one in group.registrations)


async def test_followers_renew_by_themselves_without_their_leader(group: Group) -> None:
    await group.until_carried()
    await group.server.stop(0)
    begin = len(group.directory.renewed)
    await group.until(lambda: {call[0] for call in group.directory.renewed[begin:]} == set(EVERYBODY))
    last = {call[0]: len(call) for call in group.directory.renewed[begin:]}
    assert set(last.values()) == {1}


async def test_a_lost_lease_is_told_to_whom_it_belongs(group: Group) -> None:
    await group.until_carried()
    before = group.directory.calls.count("register")
    group.directory.statuses = [pb.LEASE_STATUS_NOT_FOUND]
    await group.until(lambda: group.directory.calls.count("register") == before + SIZE)
    await group.until(lambda: all(one.standing is Standing.REGISTERED for one in group.registrations))


async def test_who_has_no_lease_or_more_to_tell_lends_nothing() -> None:
    directory = ScriptedDirectory()
    async with directory.serving() as address, DirectoryClient(address, OPTIONS) as client:
        worker = make_worker()
        registration = client.registration(lambda: worker)
        assert registration.lend(1) is None
        async with renewing(registration):
            async with asyncio.timeout(TIMEOUT_S):
                while registration.standing is not Standing.REGISTERED:  # noqa: ASYNC110 - over the wire
                    await asyncio.sleep(0.005)
            assert registration.lend(2) == renewal_of(worker)
            worker = make_worker()
            worker.capabilities.kv_blocks_total = 7
            assert registration.lend(3) is None
            await registration.end()
            assert registration.lend(4) is None


def test_news_of_an_older_heartbeat_is_none() -> None:
    registration = Registration(None, make_worker, OPTIONS, lambda: None)  # type: ignore[arg-type]
    registration._leased, registration._capabilities = True, make_worker().capabilities
    registration.lend(1)
    registration.lend(2)
    registration.on_carried(1, pb.LEASE_STATUS_RENEWED)
    assert not registration.fence.holds(time.monotonic())
    registration.on_carried(2, pb.LEASE_STATUS_RENEWED)
    assert registration.fence.holds(time.monotonic())


async def test_a_late_answer_is_not_taken_for_the_next() -> None:
    carried, outgoing = CarriedRenewals(), Outgoing()
    passenger = carried.board(outgoing)
    assert await carried.collect() == []  # nobody answers: it goes without
    number = outgoing.get_nowait().renewal_wanted.number  # type: ignore[union-attr]
    late = group_service_pb2.CarriedRenewal(number=number, renewal=renewal_of(make_worker()))
    collecting = asyncio.create_task(carried.collect())
    await asyncio.sleep(0)
    passenger.answer(late)
    assert await collecting == []
    carried.alight(passenger)
    assert await carried.collect() == []
