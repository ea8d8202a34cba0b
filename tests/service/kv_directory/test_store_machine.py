"""The store against a plain model, in random order, over simulated time, jumps of the clock and lost data."""

import asyncio
from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from redis.asyncio import Redis

from sps2.internal.v1.kv_directory_service_pb2 import (
    LEASE_STATUS_NOT_FOUND,
    LEASE_STATUS_RENEWED,
    LEASE_STATUS_STALE,
    RequestRecord,
)
from sps2.internal.v1.placement_pb2 import Attempt
from sps2.v1.cluster_pb2 import WorkerInfo
from sps2_kv_directory.config import StoreConfig
from sps2_kv_directory.script_runner import ScriptRunner
from sps2_kv_directory.store import Store
from sps2_service.errors import Aborted, NotFound
from support.directory import SimulatedClock, make_record, make_worker, renewal_of
from support.redis_server import RedisServer

pytestmark = pytest.mark.service

CONFIG = StoreConfig(timeout_s=20)  # a busy machine is not what is tested here
WORKERS = st.sampled_from(["decode-0/0", "decode-0/1", "prefill-0/0"])
LIVES = st.sampled_from(["life-1", "life-2"])
REQUESTS = st.sampled_from(["a", "b"])
ATTEMPTS = st.integers(1, 3)


class Model:
    """What the store should hold. Its lease clock counts only time that passed under the directory's eyes."""

    def __init__(self) -> None:
        self.workers: dict[str, WorkerInfo] = {}
        self.worker_leases: dict[str, float] = {}
        self.requests: dict[str, tuple[int, int, RequestRecord]] = {}
        self.request_leases: dict[str, float] = {}
        self.now = 0.0
        self.hold_until = 0.0

    def look(self, passed: float) -> None:
        """A command came `passed` seconds of wall time after the last one that looked at the clock."""
        if abs(passed) > CONFIG.max_clock_step_s:
            self.hold_until = self.now + CONFIG.lease_ttl_s
        else:
            self.now += max(0.0, passed)

    def expire(self) -> None:
        """Ends what is over."""
        if self.now < self.hold_until:
            return
        for worker_id in self.over(self.worker_leases):
            del self.workers[worker_id], self.worker_leases[worker_id]
        for request_id in self.over(self.request_leases):
            del self.requests[request_id], self.request_leases[request_id]

    def over(self, leases: dict[str, float]) -> list[str]:
        """Whose lease has ended."""
        return [name for name, end in leases.items() if end <= self.now]


class StoreMachine(RuleBasedStateMachine):
    """Each rule does the same to both; the invariant compares everything that can be seen."""

    server: RedisServer

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.clock = SimulatedClock()
        self.store = Store(ScriptRunner.connect(self.server.url, CONFIG, now_us=self.clock))
        self.client = Redis.from_url(self.server.url)
        self.unseen = 0.0  # wall time since a command last looked at the clock
        self.last_epochs: dict[str, int] = {}
        self.begin_anew()

    def begin_anew(self) -> None:
        self.runner.run(self.lose_everything())
        self.model = Model()
        self.fresh = True  # the first look of new data begins the lease clock
        self.seen = self.runner.run(self.store.state())
        self.followed: dict[str, WorkerInfo] = {}

    async def lose_everything(self) -> None:
        await self.client.flushall()

    def look(self) -> None:
        self.model.look(0.0 if self.fresh else self.unseen)
        self.fresh, self.unseen = False, 0.0

    @rule(worker_id=WORKERS, life=LIVES, running=st.integers(0, 2))
    def register(self, worker_id: str, life: str, running: int) -> None:
        worker = make_worker(worker_id, life, running=running)
        self.runner.run(self.store.register(worker))
        self.look()
        self.model.workers[worker_id] = worker
        self.model.worker_leases[worker_id] = self.model.now + CONFIG.lease_ttl_s

    @rule(worker_id=WORKERS, life=LIVES, epoch=st.integers(1, 3))
    def renew(self, worker_id: str, life: str, epoch: int) -> None:
        worker = make_worker(worker_id, life, epoch=epoch)
        known = self.model.workers.get(worker_id)
        if known is not None and known.epoch == epoch:
            worker.load.CopyFrom(known.load)  # that load alone may lag is another test's subject
        (status,) = self.runner.run(self.store.renew([renewal_of(worker)]))
        self.look()
        if known is None:
            assert status == LEASE_STATUS_NOT_FOUND
        elif known.process_incarnation != life:
            assert status == LEASE_STATUS_STALE
        else:
            assert status == LEASE_STATUS_RENEWED
            self.model.workers[worker_id] = worker
            self.model.worker_leases[worker_id] = self.model.now + CONFIG.lease_ttl_s

    @rule(worker_id=WORKERS, life=LIVES)
    def deregister(self, worker_id: str, life: str) -> None:
        known = self.model.workers.get(worker_id)
        if known is None or known.process_incarnation != life:
            with pytest.raises(NotFound if known is None else Aborted):
                self.runner.run(self.store.deregister(worker_id, life))
            return
        self.runner.run(self.store.deregister(worker_id, life))
        del self.model.workers[worker_id], self.model.worker_leases[worker_id]

    @rule(request=REQUESTS, number=ATTEMPTS, epoch=ATTEMPTS, lease=st.sampled_from([1.0, 4.0, 30.0]))
    def record(self, request: str, number: int, epoch: int, lease: float) -> None:
        record = make_record(request, number, epoch)
        known = self.model.requests.get(request)
        if known is not None and (known[0], known[1]) > (number, epoch):
            with pytest.raises(Aborted):
                self.runner.run(self.store.record(record, lease))
            self.look()
            return
        self.runner.run(self.store.record(record, lease))
        self.look()
        self.model.requests[request] = (number, epoch, record)
        self.model.request_leases[request] = self.model.now + lease

    @rule(request=REQUESTS, number=ATTEMPTS)
    def release(self, request: str, number: int) -> None:
        attempt = Attempt(request_id=request, number=number)
        known = self.model.requests.get(request)
        if known is None or known[0] > number:
            with pytest.raises(NotFound if known is None else Aborted):
                self.runner.run(self.store.release(attempt))
            return
        self.runner.run(self.store.release(attempt))
        del self.model.requests[request], self.model.request_leases[request]

    @rule(group=st.sampled_from(["g", "h"]))
    def draw_epoch(self, group: str) -> None:
        epoch = self.runner.run(self.store.draw_epoch(group))
        assert epoch == max(self.clock.us, self.last_epochs.get(group, 0) + 1)
        self.last_epochs[group] = epoch

    @rule(ticks=st.integers(1, 12))
    def time_passes(self, ticks: int) -> None:
        for _ in range(ticks):
            self.move(0.5)
            self.expire()

    @rule()
    def expire(self) -> None:
        self.runner.run(self.store.expire())
        self.look()
        self.model.expire()

    @rule(seconds=st.sampled_from([-3600.0, -10.0, -1.0, 1.0, 10.0, 3600.0]))
    def clock_jumps(self, seconds: float) -> None:
        self.move(seconds)

    @rule()
    def data_are_lost(self) -> None:
        before = self.seen.incarnation
        # Over a loss epochs rest on the wall clock alone: they grow as long as it is not set back as well.
        self.clock.us = max([self.clock.us, *self.last_epochs.values()]) + 1
        self.last_epochs = {}
        self.begin_anew()
        assert self.seen.incarnation != before

    def move(self, seconds: float) -> None:
        self.clock.move(seconds)
        self.unseen += seconds

    @invariant()
    def state_and_changes_are_the_models(self) -> None:
        changes = self.runner.run(self.store.changes(self.seen.incarnation, self.seen.revision))
        assert changes is not None
        for change in changes:
            if change.updated is not None:
                self.followed[change.updated.worker_id] = change.updated
            elif change.removed is not None:
                del self.followed[change.removed]
        self.seen = self.runner.run(self.store.state())
        assert {worker.worker_id: worker for worker in self.seen.workers} == self.model.workers
        assert self.followed == self.model.workers
        assert self.seen.num_requests == len(self.model.requests)

    @invariant()
    def located_is_what_was_recorded_last(self) -> None:
        for request, (_, _, record) in self.model.requests.items():
            assert self.runner.run(self.store.locate(request)) == record

    def teardown(self) -> None:
        self.runner.run(self.client.aclose())
        self.runner.run(self.store.close())
        self.runner.close()


@pytest.fixture
def machine(redis_server: RedisServer) -> Generator[type[StoreMachine]]:
    StoreMachine.server = redis_server
    yield StoreMachine
    del StoreMachine.server


@pytest.mark.timeout(180)
def test_the_store_does_what_the_model_does(machine: type[StoreMachine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40,
            stateful_step_count=50,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
