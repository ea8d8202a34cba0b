"""The directory as a process, with a real Redis, seen through DirectoryClient."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis import Redis

from sps2.internal.v1.kv_directory_service_pb2 import (
    GetClusterStateResponse,
    PrefixHolder,
    RegisterWorkerRequest,
)
from sps2.internal.v1.placement_pb2 import Attempt, AttentionLayout, ExactMask
from sps2.v1.cluster_pb2 import WORKER_STATE_STARTING, WorkerInfo
from sps2_service.directory_client import (
    DirectoryClient,
    DirectoryOptions,
    Membership,
    Registration,
    Standing,
)
from sps2_service.errors import ServiceError, Unavailable
from support.directory import DirectoryProcess, make_record, make_worker
from support.ports import free_port
from support.process import ManagedProcess
from support.redis_server import RedisServer
from support.waiting import wait_until

pytestmark = pytest.mark.service

TTL = 2.5
FLAGS = (
    *("--lease-ttl-s", str(TTL), "--renew-interval-s", "0.4", "--expire-interval-s", "0.1"),
    *("--store-timeout-s", "0.7", "--watch-interval-s", "0.05"),
)
PATIENT = DirectoryOptions(find_timeout_s=2)
Start = Callable[..., DirectoryProcess]


@pytest.fixture
def directory(redis_server: RedisServer, start_directory: Start) -> DirectoryProcess:
    return start_directory(redis_server.url, *FLAGS)


@asynccontextmanager
async def following(client: DirectoryClient) -> AsyncGenerator[Membership]:
    membership = client.membership()
    async with running(membership.run()):
        await membership.wait_for(lambda _: membership.connected, 10)
        yield membership


@asynccontextmanager
async def running(work: Awaitable[None]) -> AsyncGenerator[None]:
    task = asyncio.ensure_future(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task], timeout=5)


async def until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event of its own
            await asyncio.sleep(0.02)


async def state_of(client: DirectoryClient) -> GetClusterStateResponse:
    """The cluster state once the store is there: on a busy machine a call may time out now and then."""
    async with asyncio.timeout(10):
        while True:
            try:
                return await client.get_cluster_state()
            except ServiceError:
                await asyncio.sleep(0.05)


def registered(client: DirectoryClient, worker: WorkerInfo) -> Registration:
    return client.registration(lambda: worker)


async def test_a_worker_is_seen_while_it_lives_and_not_after(directory: DirectoryProcess) -> None:
    worker = make_worker(state=WORKER_STATE_STARTING)
    async with DirectoryClient(directory.address) as client, following(client) as membership:
        registration = registered(client, worker)
        async with running(registration.run()):
            await membership.wait_for(lambda workers: workers.get(worker.worker_id) == worker, 5)
            worker = make_worker(epoch=8, running=3)
            registration._get_worker = lambda: worker
            registration.renew_now()
            await membership.wait_for(lambda workers: workers.get(worker.worker_id) == worker, 1)
            worker = make_worker(epoch=8, running=3)
            worker.capabilities.kv_blocks_total += 512  # known once its engine has loaded
            registration.renew_now()
            await membership.wait_for(lambda workers: workers.get(worker.worker_id) == worker, 1)
            await asyncio.sleep(TTL + 0.5)  # renewals, and nothing else, keep it here
            assert set(membership.workers) == {worker.worker_id}
            state = await state_of(client)
            assert (list(state.workers), state.revision) == ([worker], membership.revision)
        ended = time.monotonic()
        await membership.wait_for(lambda workers: not workers, TTL + 1)
        assert time.monotonic() - ended < TTL + 1


async def test_deregistering_ends_a_lease_at_once(directory: DirectoryProcess) -> None:
    worker = make_worker()
    async with DirectoryClient(directory.address) as client, following(client) as membership:
        async with running(client.keep_registered(lambda: worker)):
            await membership.wait_for(lambda workers: len(workers) == 1, 5)
        assert await client.deregister(worker.worker_id, worker.process_incarnation)
        await membership.wait_for(lambda workers: not workers, 1)
        assert not await client.deregister(worker.worker_id, worker.process_incarnation)


async def test_the_process_that_was_replaced_is_told(directory: DirectoryProcess) -> None:
    told = asyncio.Event()
    async with DirectoryClient(directory.address) as client, following(client) as membership:
        old = asyncio.ensure_future(
            client.keep_registered(lambda: make_worker(incarnation="old"), on_stale=told.set)
        )
        await membership.wait_for(lambda workers: len(workers) == 1, 5)
        async with running(client.keep_registered(lambda: make_worker(incarnation="new"))):
            await asyncio.wait_for(old, 5)
            assert told.is_set()
            await asyncio.sleep(0.5)
            assert membership.workers["decode-0/0"].process_incarnation == "new"


async def test_a_watcher_at_one_replica_sees_what_another_did(
    redis_server: RedisServer, start_directory: Start
) -> None:
    one, other = (start_directory(redis_server.url, *FLAGS) for _ in range(2))
    async with DirectoryClient(one.address) as client, DirectoryClient(other.address) as watcher:
        async with following(watcher) as membership:
            for rank in range(20):
                await client._stub.RegisterWorker(
                    RegisterWorkerRequest(worker=make_worker(f"decode-0/{rank}")), timeout=5
                )
            await membership.wait_for(lambda workers: len(workers) == 20, 5)
            assert membership.revision >= 20
            await membership.wait_for(lambda workers: not workers, TTL + 1)
        state = await state_of(client)
        assert (len(state.workers), state.revision) == (0, 40)


async def test_requests_are_recorded_located_and_released(directory: DirectoryProcess) -> None:
    async with DirectoryClient(directory.address) as client:
        with pytest.raises(Unavailable):  # its data have just begun
            await client.locate("r")
        client.record_shards(make_record(number=1), lease_s=30)
        client.record_shards(make_record(number=2), lease_s=30)
        client.record_shards(make_record(number=1), lease_s=30)  # late: refused with ABORTED
        await client.flush(5)
        assert await client.locate("r") == make_record(number=2)
        client.release(Attempt(request_id="r", number=2))
        client.release(Attempt(request_id="never", number=1))
        await client.flush(5)
        assert (await state_of(client)).num_requests == 0
        async with asyncio.timeout(2 * TTL):
            while (await state_of(client)).recovering:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert await client.locate("r") is None


async def test_prefixes_are_found_through_another_replica(
    directory: DirectoryProcess, redis_server: RedisServer, start_directory: Start
) -> None:
    worker, chain = make_worker(), [b"%032d" % index for index in range(64)]
    other = start_directory(redis_server.url, *FLAGS)
    async with (
        DirectoryClient(directory.address, PATIENT) as first,
        DirectoryClient(other.address, PATIENT) as second,
    ):
        holder = PrefixHolder(
            worker_id=worker.worker_id,
            process_incarnation=worker.process_incarnation,
            epoch=worker.epoch,
            attention=AttentionLayout(exact=ExactMask()),
        )
        async with running(first.keep_registered(lambda: worker)), following(second) as membership:
            await membership.wait_for(lambda workers: len(workers) == 1, 5)
            await first.record_prefix(holder, chain[:40])
            (match,) = await second.find_prefix(chain)
            assert (match.holder, match.num_keys) == (holder, 40)
            await second.evict_prefix(holder, chain[30:])
            assert [match.num_keys for match in await second.find_prefix(chain)] == [30]
            with pytest.raises(ServiceError) as caught:
                await second.find_prefix([b"x" * 65])
            assert [violation.field for violation in caught.value.violations] == ["keys[0]"]
            other.kill()
            assert await second.find_prefix(chain) == []  # a prompt goes on without reuse
            assert await first.find_prefix(chain)


async def test_two_holders_of_a_prefix_tell_it_again_after_the_data_is_lost(
    directory: DirectoryProcess, redis_server: RedisServer
) -> None:
    """Each what it holds by then, no more; a prompt that asks meanwhile goes on without."""
    chain, exact = [b"%032d" % index for index in range(150)], AttentionLayout(exact=ExactMask())
    options = DirectoryOptions(find_timeout_s=2, renew_interval_s=0.2)

    async def found(client: DirectoryClient, keys: list[bytes]) -> dict[str, int]:
        return {match.holder.worker_id: match.num_keys for match in await client.find_prefix(keys)}

    async def until_found(client: DirectoryClient, keys: list[bytes], expected: dict[str, int]) -> None:
        async with asyncio.timeout(20):
            while await found(client, keys) != expected:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.05)

    async with (
        DirectoryClient(directory.address, options) as one,
        DirectoryClient(directory.address, options) as other,
    ):
        workers = [make_worker("prefill-0/0"), make_worker("prefill-1/0")]
        both = registered(one, workers[0]), registered(other, workers[1])
        async with running(both[0].run()), running(both[1].run()):
            await until(lambda: all(each.standing is Standing.REGISTERED for each in both))
            one.prefixes.hold(exact, chain)
            other.prefixes.hold(exact, chain[:40])
            await until_found(one, chain[:64], {"prefill-0/0": 64, "prefill-1/0": 40})
            await until_found(one, chain[128:], {"prefill-0/0": 22})
            with Redis.from_url(redis_server.url) as store:
                store.flushall()
            one.prefixes.drop(exact, chain[140:])
            other.prefixes.drop(exact, chain[20:40])
            await until_found(one, chain[:64], {"prefill-0/0": 64, "prefill-1/0": 20})
            await until_found(other, chain[128:], {"prefill-0/0": 12})


async def test_bad_input_names_its_field(directory: DirectoryProcess) -> None:
    async with DirectoryClient(directory.address) as client:
        with pytest.raises(ServiceError) as caught:
            await client.locate("x" * 65)
        (violation,) = caught.value.violations
        assert violation.field == "request_id"


async def test_epochs_are_drawn_with_and_without_a_directory(directory: DirectoryProcess) -> None:
    async with DirectoryClient(directory.address) as client:
        first = await client.draw_epoch("decode-0")
        second = await client.draw_epoch("decode-0", first)
        assert second > first
        assert await client.draw_epoch("decode-0", 2**52) == 2**52 + 1
        directory.kill()
        third = await client.draw_epoch("decode-0", second)
        assert third > second
        assert await client.draw_epoch("decode-0", 2**52) == 2**52 + 1


async def test_it_starts_without_redis_and_works_once_it_is_there(start_directory: Start) -> None:
    redis = RedisServer()  # not started
    directory = start_directory(redis.url, *FLAGS)
    async with DirectoryClient(directory.address) as client:
        registration = registered(client, make_worker())
        async with running(registration.run()):
            await until(lambda: registration.standing is Standing.AWAY)
            with pytest.raises(Unavailable) as caught:
                await client.get_cluster_state()
            assert caught.value.retry_after == 1
            with pytest.raises(Unavailable):
                await anext(client.watch_workers())
            try:
                redis.start()
                await until(lambda: registration.standing is Standing.REGISTERED)
                async with following(client) as membership:
                    await membership.wait_for(lambda workers: len(workers) == 1, 5)
            finally:
                redis.kill()


async def test_lost_data_cost_the_living_nothing_and_the_dead_are_forgotten(
    directory: DirectoryProcess, redis_server: RedisServer
) -> None:
    async with DirectoryClient(directory.address) as client, following(client) as membership:
        living, dead = (
            registered(client, make_worker("decode-0/0")),
            registered(client, make_worker("decode-0/1")),
        )
        async with running(living.run()):
            async with running(dead.run()):
                await membership.wait_for(lambda workers: len(workers) == 2, 5)
                before = (await state_of(client)).directory_incarnation
                client.record_shards(make_record(), lease_s=60)
                client.record_shards(make_record("over"), lease_s=60)
                client.release(Attempt(request_id="over", number=1))
                await client.flush(5)
                redis_server.kill()
                await until(lambda: living.standing is Standing.DEGRADED)
            seen: list[set[str]] = []
            async with running(collect(membership, seen)):
                redis_server.start()
                await until(lambda: living.standing is Standing.REGISTERED)
                await membership.wait_for(lambda workers: set(workers) == {"decode-0/0"}, 2 * TTL + 1)
            assert all("decode-0/0" in view for view in seen)
            await client.flush(5)
            after = await state_of(client)
            assert (after.directory_incarnation != before, after.num_requests) == (True, 1)
            assert await client.locate("r") == make_record()  # told again with the registration


async def collect(membership: Membership, seen: list[set[str]]) -> None:
    async with membership.changed:
        while True:
            seen.append(set(membership.workers))
            await membership.changed.wait()  # ends with its task


async def test_while_redis_hangs_calls_end_in_time_and_no_lease_ends(
    directory: DirectoryProcess, redis_server: RedisServer
) -> None:
    async with DirectoryClient(directory.address) as client, following(client) as membership:
        registration = registered(client, make_worker())
        async with running(registration.run()):
            await membership.wait_for(lambda workers: len(workers) == 1, 5)
            redis_server.stop()
            began = time.monotonic()
            for _ in range(20):
                with pytest.raises(Unavailable):
                    await client.get_cluster_state()
            assert time.monotonic() - began < 10  # not 20 timeouts
            await until(lambda: registration.standing is Standing.DEGRADED)
            contact = registration.last_contact
            await asyncio.sleep(TTL + 0.5)  # long enough for every lease to have ended
            assert registration.last_contact != contact  # DEGRADED is contact: nobody fences
            revision = membership.revision
            redis_server.resume()
            await until(lambda: registration.standing is Standing.REGISTERED)
            assert (membership.connected, len(membership.workers)) == (True, 1)
            assert (await state_of(client)).revision == revision  # nothing came and went
        await membership.wait_for(lambda workers: not workers, 2 * TTL + 1)


async def test_clients_outlive_a_killed_directory(directory: DirectoryProcess) -> None:
    worker = make_worker()
    async with DirectoryClient(directory.address) as client, following(client) as membership:
        registration = registered(client, worker)
        async with running(registration.run()):
            await membership.wait_for(lambda workers: len(workers) == 1, 5)
            directory.kill()
            await until(lambda: not membership.connected and registration.standing is Standing.AWAY)
            client.record_shards(make_record())
            await client.flush(5)
            assert client.num_dropped == 1
            assert membership.workers == {worker.worker_id: worker}
            directory.start()
            await until(lambda: membership.connected and registration.standing is Standing.REGISTERED)
            assert set(membership.workers) == {worker.worker_id}
            client.record_shards(make_record())
            await client.flush(5)
            assert await client.locate("r") == make_record()


async def test_a_stopped_directory_is_noticed(directory: DirectoryProcess) -> None:
    async with DirectoryClient(directory.address) as client, following(client) as membership:
        directory.stop()
        began = time.monotonic()
        await until(lambda: not membership.connected, 8)
        with pytest.raises(ServiceError):
            await client.get_cluster_state()
        assert time.monotonic() - began < 10
        directory.process.send(signal.SIGCONT)
        await until(lambda: membership.connected)


async def test_sigterm_ends_it_cleanly_with_a_watch_open(directory: DirectoryProcess) -> None:
    async with DirectoryClient(directory.address) as client, following(client) as membership:
        directory.process.send(signal.SIGTERM)
        await until(lambda: not membership.connected, 5)
        assert await asyncio.to_thread(directory.process.wait, 5) == 0


def test_it_announces_the_port_it_got(redis_server: RedisServer) -> None:
    read, write = os.pipe()
    command = [sys.executable, "-P", "-m", "sps2_kv_directory", "--announce-fd", str(write)]
    with subprocess.Popen([*command, "--redis", redis_server.url], pass_fds=[write]) as process:
        os.close(write)
        try:
            with os.fdopen(read) as pipe:
                host, _, port = pipe.readline().strip().partition(":")
            assert (host, int(port) > 0) == ("127.0.0.1", True)
        finally:
            process.terminate()
            assert process.wait(10) == 0


def test_it_ends_with_its_parent() -> None:
    starter = (
        "import os, subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-P', '-m', 'sps2_kv_directory', '--redis', sys.argv[1],"
        " '--parent-pid', str(os.getpid())])\n"
        "print('started', p.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", starter, f"redis://127.0.0.1:{free_port()}"]
    with ManagedProcess(command, name="starter") as parent:
        pid = int(parent.wait_for_line(r"started (\d+)").group(1))
        parent.wait_for_line('"event": "serving"')
        parent.send(signal.SIGKILL)
        wait_until(lambda: process_state(pid) == "Z")


def process_state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"  # gone altogether


def test_settings_that_contradict_each_other_are_a_usage_error() -> None:
    command = [sys.executable, "-P", "-m", "sps2_kv_directory", "--lease-ttl-s", "1"]
    with ManagedProcess(command, name="kv_directory") as process:
        assert process.wait() == 2
        assert "renew_interval_s" in process.output
