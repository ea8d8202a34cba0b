"""Prefixes of chains of blocks: the longest run of each holder, for as long as its lease and epoch last."""

import pytest
from redis.asyncio import Redis

from sps2.internal.v1.kv_directory_service_pb2 import PrefixHolder
from sps2.internal.v1.placement_pb2 import AttentionLayout, CsaMask, ExactMask
from sps2.v1.cluster_pb2 import WorkerInfo
from sps2_kv_directory import store as store_module
from sps2_kv_directory.store import Store
from sps2_service.directory_registration import renewal_of
from sps2_service.errors import Aborted, NotFound, Unavailable
from support.directory import SimulatedClock, make_worker, recover
from support.redis_server import RedisServer

pytestmark = pytest.mark.service

CHAIN = [bytes([index]) * 32 for index in range(64)]
EXACT = AttentionLayout(num_tokens=4096, num_prefilled=4096, exact=ExactMask())
CSA = AttentionLayout(num_tokens=4096, num_prefilled=4096, csa=CsaMask(num_shards=4, shard_tokens=1024))


def held_by(worker: WorkerInfo, attention: AttentionLayout = EXACT) -> PrefixHolder:
    return PrefixHolder(
        worker_id=worker.worker_id,
        process_incarnation=worker.process_incarnation,
        epoch=worker.epoch,
        attention=attention,
    )


async def runs(store: Store, keys: list[bytes] = CHAIN) -> list[tuple[str, str | None, int]]:
    """(worker, kind of mask, length) of what is found."""
    found = await store.find_prefix(keys)
    return [(one.holder.worker_id, one.holder.attention.WhichOneof("mask"), one.num_keys) for one in found]


async def registered(store: Store, worker_id: str) -> WorkerInfo:
    worker = make_worker(worker_id)
    await store.register(worker)
    return worker


async def test_the_longest_run_comes_first_with_how_it_was_made(store: Store) -> None:
    first, second = await registered(store, "decode-0/0"), await registered(store, "decode-1/0")
    await store.record_prefix(held_by(first), CHAIN[:3])
    await store.record_prefix(held_by(second), CHAIN[:10])
    await store.record_prefix(held_by(second), CHAIN[20:30])  # after a hole
    assert await runs(store) == [("decode-1/0", "exact", 10), ("decode-0/0", "exact", 3)]
    (match, _) = await store.find_prefix(CHAIN)
    assert match.holder == held_by(second, AttentionLayout(exact=ExactMask()))
    assert await runs(store, CHAIN[10:]) == []
    assert await store.find_prefix([]) == []


async def test_a_match_never_mixes_layouts(store: Store) -> None:
    worker = await registered(store, "decode-0/0")
    await store.record_prefix(held_by(worker), CHAIN[:4])
    await store.record_prefix(held_by(worker, CSA), CHAIN[2:9])
    assert await runs(store) == [("decode-0/0", "exact", 4)]
    await store.record_prefix(held_by(worker, CSA), CHAIN[:2])
    assert await runs(store) == [("decode-0/0", "csa", 9), ("decode-0/0", "exact", 4)]


async def test_exact_kv_of_prompts_of_any_length_is_one(store: Store) -> None:
    worker = await registered(store, "decode-0/0")
    other = AttentionLayout(num_tokens=999, num_prefilled=999, exact=ExactMask())
    await store.record_prefix(held_by(worker), CHAIN[:4])
    await store.record_prefix(held_by(worker, other), CHAIN[4:6])
    assert await runs(store) == [("decode-0/0", "exact", 6)]


async def test_what_is_evicted_is_not_found(store: Store) -> None:
    worker = await registered(store, "decode-0/0")
    await store.record_prefix(held_by(worker), CHAIN[:4])
    await store.record_prefix(held_by(worker, CSA), CHAIN[:4])
    await store.evict_prefix(held_by(worker), [*CHAIN[2:4], b"never told"])
    assert await runs(store) == [("decode-0/0", "csa", 4), ("decode-0/0", "exact", 2)]
    await store.evict_prefix(held_by(worker, CSA), CHAIN[:4])
    await store.evict_prefix(held_by(worker), CHAIN[:2])
    assert (await store.state()).num_prefix_keys == 0


async def test_who_has_no_lease_in_this_life_and_epoch_is_refused(store: Store) -> None:
    with pytest.raises(NotFound):
        await store.record_prefix(held_by(make_worker()), CHAIN[:1])
    await store.register(make_worker(epoch=8))
    for stale in (make_worker(epoch=7), make_worker(incarnation="before", epoch=8)):
        for refused in (store.record_prefix, store.evict_prefix):
            with pytest.raises(Aborted):
                await refused(held_by(stale), CHAIN[:1])
    with pytest.raises(NotFound):  # its heartbeat has not told of that epoch yet
        await store.record_prefix(held_by(make_worker(epoch=9)), CHAIN[:1])


@pytest.mark.parametrize("end", ["lease", "deregister", "life", "epoch", "epoch by registration"])
async def test_what_was_told_ends_with_the_lease_the_life_and_the_epoch(
    store: Store, clock: SimulatedClock, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(store_module, "EXPIRIES_PER_SCRIPT", 10)
    worker, other = make_worker("decode-0/0"), make_worker("decode-0/00")
    for one in (worker, other):
        await store.register(one)
        await store.record_prefix(held_by(one), CHAIN[:25])
    if end == "lease":
        for _ in range(11):
            clock.move(0.5)
            await store.renew([renewal_of(other)])
            await store.expire()
    elif end == "deregister":
        await store.deregister(worker.worker_id, worker.process_incarnation)
    elif end == "epoch":
        await store.renew([renewal_of(make_worker("decode-0/0", epoch=8))])
    else:
        await store.register(make_worker("decode-0/0", "new life" if end == "life" else "life-1", epoch=8))
    assert await runs(store) == [("decode-0/00", "exact", 25)]
    await store.register(worker)  # as it was; what it told before does not come back
    assert await runs(store) == [("decode-0/00", "exact", 25)]
    await store.evict_prefix(held_by(other), CHAIN[:25])
    swept = [(await store.expire()).num_prefix_keys for _ in range(5)]
    assert (await store.state()).num_prefix_keys == 0, swept
    assert await runs(store) == []


async def test_a_lost_store_begins_without_prefixes(store: Store, redis_server: RedisServer) -> None:
    worker = await registered(store, "decode-0/0")
    await store.record_prefix(held_by(worker), CHAIN[:4])
    client = Redis.from_url(redis_server.url)
    await client.delete("{sps2}:directory")
    await client.aclose()
    assert await runs(store) == []
    await store.register(worker)
    assert await runs(store) == []


async def test_epochs_that_were_not_drawn_here_count_as_drawn(store: Store, clock: SimulatedClock) -> None:
    ahead = clock.us + 1_000_000
    assert await store.draw_epoch("decode-0", previous=ahead) == ahead + 1
    await store.register(make_worker(epoch=ahead + 5))
    assert await store.draw_epoch("decode-0") == ahead + 6
    await store.renew([renewal_of(make_worker(epoch=ahead + 9))])
    assert await store.draw_epoch("decode-0") == ahead + 10


async def test_while_it_recovers_nobody_is_told_that_a_request_is_unknown(
    store: Store, clock: SimulatedClock, redis_server: RedisServer
) -> None:
    client = Redis.from_url(redis_server.url)
    await client.flushall()
    await client.aclose()
    with pytest.raises(Unavailable, match="lost its data"):
        await store.locate("r")
    assert (await store.state()).recovering
    await recover(store, clock)
    with pytest.raises(NotFound):
        await store.locate("r")
    assert not (await store.state()).recovering
