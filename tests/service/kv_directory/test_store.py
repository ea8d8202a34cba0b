"""The store's commands against a real Redis, mostly under simulated time."""

import asyncio
import time

import pytest
from redis.asyncio import Redis

from sps2.internal.v1.kv_directory_service_pb2 import (
    ADMISSION_STATUS_ADMITTED,
    ADMISSION_STATUS_REFUSED,
    ADMISSION_STATUS_SUPERSEDES,
    LEASE_STATUS_NOT_FOUND,
    LEASE_STATUS_RENEWED,
    LEASE_STATUS_STALE,
    LeaseRenewal,
    RequestAdmission,
)
from sps2.internal.v1.placement_pb2 import Attempt
from sps2.v1.cluster_pb2 import WORKER_STATE_DRAINING
from sps2_kv_directory import store as store_module
from sps2_kv_directory.config import StoreConfig
from sps2_kv_directory.script_runner import ScriptRunner
from sps2_kv_directory.store import Store, WorkerChange
from sps2_service.directory_registration import renewal_of
from sps2_service.errors import Aborted, NotFound, Unavailable
from support.directory import SimulatedClock, make_record, make_worker
from support.redis_server import RedisServer

pytestmark = pytest.mark.service

TTL = StoreConfig().lease_ttl_s


async def pass_time(store: Store, clock: SimulatedClock, seconds: float) -> int:
    """Time passes while the directory runs, so `expire` is called all along; the number of workers ended."""
    ended = 0
    for _ in range(round(seconds / 0.5)):
        clock.move(0.5)
        ended += (await store.expire()).num_workers
    return ended


async def changes_since(store: Store, log: str, revision: int) -> list[WorkerChange] | None:
    changes = await store.changes(log, revision)
    return None if changes is None else changes.changes


async def worker_ids(store: Store) -> list[str]:
    return [worker.worker_id for worker in (await store.state()).workers]


async def test_a_registered_worker_is_in_the_state_as_it_was(store: Store) -> None:
    workers = [make_worker("decode-0/1", running=3), make_worker("decode-0/0", epoch=2**53)]
    for worker in workers:
        await store.register(worker)
    state = await store.state()
    assert state.workers == workers[::-1]
    assert (state.revision, state.num_requests) == (2, 0)


async def test_registering_again_is_a_change_only_if_something_changed(store: Store) -> None:
    await store.register(make_worker())
    await store.register(make_worker())
    assert (await store.state()).revision == 1
    await store.register(make_worker(incarnation="life-2"))
    assert (await store.state()).revision == 2


async def test_renewals_are_answered_in_order_over_several_scripts(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "RENEWALS_PER_SCRIPT", 2)
    await store.register(make_worker("decode-0/0"))
    await store.register(make_worker("decode-0/1"))
    renewals = [
        renewal_of(make_worker("decode-0/0")),
        renewal_of(make_worker("decode-0/0", incarnation="life-0")),
        renewal_of(make_worker("decode-9/9")),
        renewal_of(make_worker("decode-0/1")),
        LeaseRenewal(worker_id="decode-0/1"),
    ]
    expected = [LEASE_STATUS_RENEWED, LEASE_STATUS_STALE, LEASE_STATUS_NOT_FOUND, LEASE_STATUS_RENEWED]
    assert await store.renew(renewals) == [*expected, LEASE_STATUS_STALE]
    assert await store.renew([]) == []


async def test_load_alone_is_published_at_most_once_a_second(store: Store, clock: SimulatedClock) -> None:
    await store.register(make_worker())
    revisions = []
    for running in range(1, 9):
        clock.move(0.4)
        await store.renew([renewal_of(make_worker(running=running))])
        revisions.append((await store.state()).revision)
    assert revisions == [1, 1, 2, 2, 2, 3, 3, 3]
    (worker,) = (await store.state()).workers
    assert worker == make_worker(running=6)


async def test_a_change_of_state_is_published_at_once_and_brings_the_load(store: Store) -> None:
    await store.register(make_worker())
    draining = make_worker(state=WORKER_STATE_DRAINING, epoch=8, running=2)
    await store.renew([renewal_of(draining)])
    state = await store.state()
    assert (state.workers, state.revision) == ([draining], 2)
    await store.renew([renewal_of(draining)])
    assert (await store.state()).revision == 2


async def test_a_lease_ends_after_its_ttl_unless_renewed(store: Store, clock: SimulatedClock) -> None:
    await store.register(make_worker("decode-0/0"))
    await store.register(make_worker("decode-0/1"))
    for _ in range(4):
        assert await pass_time(store, clock, TTL - 1) == 0
        assert await store.renew([renewal_of(make_worker("decode-0/0"))]) == [LEASE_STATUS_RENEWED]
        await store.register(make_worker("decode-0/1"))
    assert await pass_time(store, clock, TTL - 0.5) == 0
    assert await pass_time(store, clock, 0.5) == 2
    assert await worker_ids(store) == []
    assert await store.renew([renewal_of(make_worker("decode-0/0"))]) == [LEASE_STATUS_NOT_FOUND]


async def test_the_newer_process_holds_the_lease(store: Store) -> None:
    await store.register(make_worker(incarnation="old"))
    await store.register(make_worker(incarnation="new"))
    assert await store.renew([renewal_of(make_worker(incarnation="old"))]) == [LEASE_STATUS_STALE]
    with pytest.raises(Aborted):
        await store.deregister("decode-0/0", "old")
    assert (await store.state()).workers == [make_worker(incarnation="new")]
    await store.deregister("decode-0/0", "new")
    assert await worker_ids(store) == []
    with pytest.raises(NotFound):
        await store.deregister("decode-0/0", "new")


async def test_epochs_grow_also_when_redis_forgets(
    store: Store, clock: SimulatedClock, redis_server: RedisServer
) -> None:
    first = await store.draw_epoch("decode-0")
    assert first == clock.us
    assert await store.draw_epoch("decode-0") == first + 1
    clock.move(-60)
    assert await store.draw_epoch("decode-0") == first + 2
    assert await store.draw_epoch("decode-1") == clock.us
    clock.move(61)
    await flush(redis_server)
    assert await store.draw_epoch("decode-0") > first + 2


async def test_epochs_come_from_redis_time(redis_server: RedisServer) -> None:
    store = Store(ScriptRunner.connect(redis_server.url, StoreConfig()))
    assert abs(await store.draw_epoch("g") - time.time_ns() // 1000) < 60e6
    await store.close()


async def test_a_record_gives_way_to_newer_attempts_and_epochs_only(store: Store) -> None:
    await store.record(make_record(number=2, epoch=7), 60)
    for stale in (make_record(number=1, epoch=9), make_record(number=2, epoch=6)):
        with pytest.raises(Aborted):
            await store.record(stale, 60)
    assert (await store.locate("r")).record == make_record(number=2, epoch=7)
    for newer in (
        make_record(number=2, epoch=7),
        make_record(number=2, epoch=8),
        make_record(number=3, epoch=1),
    ):
        await store.record(newer, 60)
        assert (await store.locate("r")).record == newer
    assert (await store.state()).num_requests == 1


async def test_release_forgets_an_attempt_but_no_newer_one(store: Store) -> None:
    await store.record(make_record(number=2), 60)
    with pytest.raises(Aborted):
        await store.release(Attempt(request_id="r", number=1))
    await store.release(Attempt(request_id="r", number=2))
    with pytest.raises(NotFound):
        await store.locate("r")
    with pytest.raises(NotFound):
        await store.release(Attempt(request_id="r", number=2))
    await store.record(make_record(number=2), 60)
    await store.release(Attempt(request_id="r", number=3))
    assert (await store.state()).num_requests == 0


async def test_a_record_expires_with_its_lease(store: Store, clock: SimulatedClock) -> None:
    await store.record(make_record("short"), 1)
    await store.record(make_record("long"), 10)
    await pass_time(store, clock, 1)
    assert (await store.state()).num_requests == 1
    await store.record(make_record("long"), 20)
    await pass_time(store, clock, 19)
    assert (await store.locate("long")).record == make_record("long")
    await pass_time(store, clock, 1)
    with pytest.raises(NotFound):
        await store.locate("long")


@pytest.mark.parametrize("jump", [3600.0, -3600.0, 3.0, -3.0])
async def test_after_an_outage_or_a_jump_nothing_expires_for_one_ttl(
    store: Store, clock: SimulatedClock, jump: float
) -> None:
    await store.register(make_worker("decode-0/0"))
    await store.register(make_worker("decode-0/1"))
    await store.record(make_record(), TTL)
    await pass_time(store, clock, TTL - 0.5)
    clock.move(jump)  # nobody called, or the clock was set
    assert await pass_time(store, clock, TTL) == 0
    assert await store.renew([renewal_of(make_worker("decode-0/0"))]) == [LEASE_STATUS_RENEWED]
    assert await pass_time(store, clock, 0.5) == 1
    assert await worker_ids(store) == ["decode-0/0"]
    with pytest.raises(NotFound):
        await store.locate("r")
    # The clock that was renewed after the jump runs as before.
    assert await pass_time(store, clock, TTL - 1) == 0
    assert await pass_time(store, clock, 0.5) == 1


async def test_a_jump_seen_by_a_renewal_first_does_not_stretch_its_lease(
    store: Store, clock: SimulatedClock
) -> None:
    await store.register(make_worker())
    clock.move(3600)
    await store.renew([renewal_of(make_worker())])
    assert await pass_time(store, clock, TTL) == 1


async def test_expiry_works_in_bounded_portions(
    store: Store, clock: SimulatedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "EXPIRIES_PER_SCRIPT", 3)
    for rank in range(5):
        await store.register(make_worker(f"decode-0/{rank}"))
    for _ in range(9):
        clock.move(0.5)
        await store.expire()
    clock.move(0.5)
    first, second = await store.expire(), await store.expire()
    assert (first.num_workers, first.more, second.num_workers, second.more) == (3, True, 2, False)


async def test_changes_continue_a_state(store: Store, clock: SimulatedClock) -> None:
    await store.register(make_worker("decode-0/0"))
    state = await store.state()
    await store.register(make_worker("decode-0/1"))
    await store.deregister("decode-0/0", "life-1")
    await pass_time(store, clock, TTL)
    assert await changes_since(store, state.log, state.revision) == [
        WorkerChange(updated=make_worker("decode-0/1"), removed=None),
        WorkerChange(updated=None, removed="decode-0/0"),
        WorkerChange(updated=None, removed="decode-0/1"),
    ]
    assert await changes_since(store, state.log, (await store.state()).revision) == []


async def test_changes_that_cannot_be_continued_are_a_gap(store: Store, redis_server: RedisServer) -> None:
    await store.register(make_worker())
    state = await store.state()
    assert await changes_since(store, "another", 0) is None
    assert await changes_since(store, state.log, 99) is None
    client = Redis.from_url(redis_server.url)
    await client.xtrim("{sps2}:changes", maxlen=0)
    await client.aclose()
    assert await changes_since(store, state.log, 0) is None
    assert await changes_since(store, state.log, 1) == []


async def test_data_that_come_back_are_another_log(store: Store, redis_server: RedisServer) -> None:
    """The last changes before a crash may be lost, and others have their revisions."""
    await store.register(make_worker("decode-0/0"))
    before = await store.state()
    async with Redis.from_url(redis_server.url) as client:
        dumps = {key: await client.dump(key) for key in await client.keys("{sps2}:*")}
    redis_server.kill()
    redis_server.start()
    async with Redis.from_url(redis_server.url) as client:
        for key, dump in dumps.items():
            assert dump is not None
            await client.restore(key, 0, dump)
    await answers(store)
    after = await store.state()
    assert (after.incarnation, after.workers) == (before.incarnation, before.workers)
    assert await store.changes(before.log, before.revision) is None
    assert await changes_since(store, after.log, after.revision) == []


async def test_the_log_of_changes_is_bounded(store: Store, redis_server: RedisServer) -> None:
    client = Redis.from_url(redis_server.url)
    await store.register(make_worker())
    await client.eval(
        "for i = 2, 20000 do redis.call('XADD', KEYS[1], i .. '-0', 'removed', 'x') end "
        "redis.call('HSET', KEYS[2], 'revision', 20000)",
        2,
        "{sps2}:changes",
        "{sps2}:directory",
    )
    for rank in (1, 2):  # Redis trims some 10,000 entries with each new one
        await store.register(make_worker(f"decode-0/{rank}"))
    assert await client.xlen("{sps2}:changes") < 10_000
    await client.aclose()
    log = (await store.state()).log
    assert await changes_since(store, log, 1) is None
    recent = await changes_since(store, log, 15_000)
    assert recent is not None
    assert len(recent) == store_module.CHANGES_PER_SCRIPT


async def flush(redis_server: RedisServer, *keys: str) -> None:
    client = Redis.from_url(redis_server.url)
    if keys:
        await client.delete(*keys)
    else:
        await client.flushall()
    await client.aclose()


@pytest.mark.parametrize("keys", [(), ("{sps2}:directory",)])
async def test_lost_data_begin_anew_under_another_incarnation(
    store: Store, redis_server: RedisServer, keys: tuple[str, ...]
) -> None:
    await store.register(make_worker())
    await store.record(make_record(number=5), 60)
    before = await store.state()
    await flush(redis_server, *keys)
    assert await store.renew([renewal_of(make_worker())]) == [LEASE_STATUS_NOT_FOUND]
    after = await store.state()
    assert after.incarnation != before.incarnation
    assert (after.workers, after.revision, after.num_requests) == ([], 0, 0)
    await store.register(make_worker())
    assert (await store.state()).workers == [make_worker()]


async def test_scripts_that_redis_forgot_are_loaded_again(store: Store, redis_server: RedisServer) -> None:
    await store.register(make_worker())
    client = Redis.from_url(redis_server.url)
    await client.script_flush()
    await client.aclose()
    assert await store.renew([renewal_of(make_worker())]) == [LEASE_STATUS_RENEWED]


async def test_two_namespaces_do_not_meet(store: Store, redis_server: RedisServer) -> None:
    other = Store(ScriptRunner.connect(redis_server.url, StoreConfig(namespace="other")))
    await other.register(make_worker("decode-5/0"))
    await store.register(make_worker())
    assert await worker_ids(store) == ["decode-0/0"]
    await other.close()


async def test_a_hanging_redis_costs_one_timeout_and_loses_no_lease(
    redis_server: RedisServer, clock: SimulatedClock
) -> None:
    store = Store(ScriptRunner.connect(redis_server.url, StoreConfig(timeout_s=1), now_us=clock))
    await store.register(make_worker())
    redis_server.stop()
    began = time.monotonic()
    for _ in range(50):
        with pytest.raises(Unavailable) as caught:
            await store.state()
        assert caught.value.retry_after is not None
    assert time.monotonic() - began < 5  # not 50 timeouts
    redis_server.resume()
    clock.move(60)
    await answers(store)
    assert (await store.expire()).num_workers == 0
    assert await store.renew([renewal_of(make_worker())]) == [LEASE_STATUS_RENEWED]
    await store.close()


async def test_a_restarted_redis_is_found_again(store: Store, redis_server: RedisServer) -> None:
    await store.register(make_worker())
    before = await store.state()
    redis_server.kill()
    with pytest.raises(Unavailable):
        await store.state()
    redis_server.start()
    await answers(store)
    assert (await store.state()).incarnation != before.incarnation


@pytest.mark.parametrize(("setting", "refusing", "working"), [("maxmemory", "1", "0")])
async def test_a_redis_that_cannot_write_now_is_away(
    store: Store, redis_server: RedisServer, setting: str, refusing: str, working: str
) -> None:
    client = Redis.from_url(redis_server.url)
    await store.register(make_worker())
    await client.config_set(setting, refusing)
    with pytest.raises(Unavailable):
        await store.renew([renewal_of(make_worker())])
    await client.config_set(setting, working)
    await client.aclose()
    await answers(store)
    assert await store.renew([renewal_of(make_worker())]) == [LEASE_STATUS_RENEWED]


async def test_a_read_only_redis_is_away(redis_server: RedisServer, store: Store) -> None:
    client = Redis.from_url(redis_server.url)
    await client.replicaof("127.0.0.1", "1")
    with pytest.raises(Unavailable):
        await store.register(make_worker())
    await client.replicaof("NO", "ONE")
    await client.aclose()
    await answers(store)


async def answers(store: Store) -> None:
    """Waits until the store answers again."""
    async with asyncio.timeout(5):
        while True:
            try:
                await store.state()
            except Unavailable:
                await asyncio.sleep(0.05)
            else:
                return


async def test_a_password_opens_redis_and_without_it_the_store_is_away(redis_server: RedisServer) -> None:
    client = Redis.from_url(redis_server.url)
    await client.config_set("requirepass", "open")
    await client.aclose()
    shut = Store(ScriptRunner.connect(redis_server.url, StoreConfig()))
    with pytest.raises(Unavailable):
        await shut.state()
    opened = Store(ScriptRunner.connect(redis_server.url, StoreConfig(timeout_s=3), password="open"))
    assert (await opened.state()).workers == []
    for store in (shut, opened):
        await store.close()


def admission(
    call: str, *, nonce: bytes = b"", renewal: bool = False, request: str = "r"
) -> RequestAdmission:
    return RequestAdmission(
        request_id=request, call_id=call, router_address=f"{call}:1", nonce=nonce, renewal=renewal
    )


async def test_a_request_is_one_calls_until_it_is_dismissed(store: Store) -> None:
    first, second = admission("a"), admission("b")
    (admitted,) = await store.admit([first], 30)
    assert (admitted.status, admitted.HasField("other")) == (ADMISSION_STATUS_ADMITTED, False)
    results = await store.admit([second, admission("c", request="s")], 30)
    assert [one.status for one in results] == [ADMISSION_STATUS_REFUSED, ADMISSION_STATUS_ADMITTED]
    assert results[0].other == first
    found = await store.locate("r")
    assert (found.admission, found.HasField("record")) == (first, False)
    with pytest.raises(NotFound):
        await store.dismiss("r", "b")
    await store.dismiss("r", "a")
    with pytest.raises(NotFound):
        await store.locate("r")
    await store.record(make_record(), 60)
    assert not (await store.locate("r")).HasField("admission")


async def test_a_retry_takes_the_place_of_its_call_which_cannot_renew(store: Store) -> None:
    first, retry = admission("a", nonce=b"n"), admission("b", nonce=b"n")
    await store.admit([first], 30)
    (taken,) = await store.admit([retry], 30)
    assert (taken.status, taken.other) == (ADMISSION_STATUS_SUPERSEDES, first)
    (late,) = await store.admit([admission("a", nonce=b"n", renewal=True)], 30)
    assert (late.status, late.other) == (ADMISSION_STATUS_REFUSED, retry)
    (other,) = await store.admit([admission("c", nonce=b"x")], 30)
    assert other.status == ADMISSION_STATUS_REFUSED


async def test_admissions_of_a_router_that_is_gone_end(store: Store, clock: SimulatedClock) -> None:
    await store.admit([admission("a"), admission("b", request="s")], 30)
    await pass_time(store, clock, 20)
    await store.admit([admission("b", request="s", renewal=True)], 30)
    await pass_time(store, clock, 15)
    with pytest.raises(NotFound):
        await store.locate("r")
    assert (await store.locate("s")).admission.call_id == "b"
