"""The directory's store and its workers' fences against a plain model, in random order.

Two replicas over one real Redis, simulated time, and faults: Redis away, every replica away, lost data, jumps of the
wall clock, workers and replicas that pause, replies that are lost after the script has run, epochs drawn without a
directory. Which of them come when is hypothesis's choice, from a seed.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from redis.asyncio import Redis

from sps2.internal.v1.kv_directory_service_pb2 import (
    LEASE_STATUS_NOT_FOUND,
    LEASE_STATUS_RENEWED,
    LEASE_STATUS_STALE,
    PrefixHolder,
    PrefixMatch,
    RequestRecord,
)
from sps2.internal.v1.placement_pb2 import Attempt, AttentionLayout, CsaMask, ExactMask
from sps2.v1.cluster_pb2 import WorkerInfo
from sps2_kv_directory.config import StoreConfig
from sps2_kv_directory.script_runner import ScriptRunner, away
from sps2_kv_directory.store import Changes, Store, StoreState
from sps2_service.directory_registration import renewal_of
from sps2_service.errors import Aborted, NotFound, ServiceError, Unavailable
from sps2_service.lease_fence import LeaseFence
from support.directory import SimulatedClock, make_record, make_worker

T = TypeVar("T")

CONFIG = StoreConfig(timeout_s=20, pause_s=0)  # a busy machine is not what is tested here
TICK_S = 1.0
WORKERS = st.sampled_from(["decode-0/0", "decode-0/1"])
LIVES = st.sampled_from(["life-1", "life-2"])
PROCESSES = st.sampled_from(["prefill-0/0", "prefill-0/1"])
REQUESTS = st.sampled_from(["a", "b"])
ATTEMPTS = st.integers(1, 3)
REPLICAS = st.sampled_from([0, 1])
LOST = st.sampled_from([False, False, False, True])
"""Whether a reply is lost on its way, after the script has run."""
CHAIN = [b"%d" % index for index in range(5)]
LAYOUTS = {"exact": AttentionLayout(exact=ExactMask()), "csa": AttentionLayout(csa=CsaMask(num_shards=2))}


class FaultyRunner(ScriptRunner):
    """A runner whose Redis is away when the test says so, before or after it has run the script."""

    away_now = False
    loses_reply = False
    edits: ClassVar[dict[str, tuple[str, str]]] = {}
    """Script -> a piece of it and what stands there instead: a fault that a test puts into the store."""

    def __init__(self, client: Redis, config: StoreConfig, now_us: Callable[[], int] | None = None) -> None:
        super().__init__(client, config, now_us)
        for name, (piece, instead) in self.edits.items():
            script = str(self._scripts[name].script)
            assert piece in script
            self._scripts[name] = client.register_script(script.replace(piece, instead))

    async def run(self, name: str, *args: str | bytes | float) -> Any:
        if self.away_now:
            self.num_failures += 1
            raise away("the test's")
        reply = await super().run(name, *args)
        if self.loses_reply:
            self.num_failures += 1
            raise away("the test's, too late")
        return reply


class Model:
    """What the store should hold. Its lease clock counts only time that passed under the directory's eyes."""

    def __init__(self) -> None:
        self.workers: dict[str, WorkerInfo] = {}
        self.worker_leases: dict[str, float] = {}
        self.lives: dict[str, int] = {}
        """Worker -> a number that changes with its lease, incarnation and epoch: what it told is void then."""
        self.num_lives = 0
        self.requests: dict[str, tuple[int, int, RequestRecord]] = {}
        self.request_leases: dict[str, float] = {}
        self.prefixes: dict[tuple[str, str], dict[bytes, int]] = {}
        """(worker, layout) -> key -> the life in which it was told."""
        self.now = 0.0
        self.hold_until = CONFIG.lease_ttl_s
        self.recovering = True

    def look(self, passed: float) -> None:
        """A command came `passed` seconds of wall time after the last one that looked at the clock."""
        if abs(passed) > CONFIG.max_clock_step_s:
            self.hold_until = self.now + CONFIG.lease_ttl_s
        else:
            self.now += max(0.0, passed)

    def put_worker(self, worker: WorkerInfo) -> None:
        """Registers or renews it."""
        old = self.workers.get(worker.worker_id)
        if old is None or (old.process_incarnation, old.epoch) != (worker.process_incarnation, worker.epoch):
            self.num_lives += 1
            self.lives[worker.worker_id] = self.num_lives
        self.workers[worker.worker_id] = worker
        self.worker_leases[worker.worker_id] = self.now + CONFIG.lease_ttl_s

    def remove_worker(self, worker_id: str) -> None:
        """Ends its lease."""
        del self.workers[worker_id], self.worker_leases[worker_id], self.lives[worker_id]

    def expire(self, *, was_away: bool) -> None:
        """Ends what is over."""
        if was_away:
            self.hold_until = self.now + CONFIG.lease_ttl_s
        if self.now < self.hold_until:
            return
        self.recovering = False
        for worker_id in _over(self.worker_leases, self.now):
            self.remove_worker(worker_id)
        for request_id in _over(self.request_leases, self.now):
            del self.requests[request_id], self.request_leases[request_id]

    def find(self, keys: Sequence[bytes]) -> dict[tuple[str, str], int]:
        """(worker, layout) -> its leading run, where it has one."""
        return {holder: run for holder in self.prefixes if (run := self._run(holder, keys))}

    def _run(self, holder: tuple[str, str], keys: Sequence[bytes]) -> int:
        told, life = self.prefixes[holder], self.lives.get(holder[0])
        for index, key in enumerate(keys):
            if life is None or told.get(key) != life:
                return index
        return len(keys)


def _over(leases: dict[str, float], now: float) -> list[str]:
    return [name for name, end in leases.items() if end <= now]


@dataclass
class Process:
    """One life of a worker as it sees itself; paused while no rule picks it."""

    worker_id: str
    life: int
    epoch: int = 0
    fence: LeaseFence = field(default_factory=LeaseFence)
    leased: bool = False
    data: int = -1
    """Which of the store's data its lease is in."""

    @property
    def info(self) -> WorkerInfo:
        """As it tells the directory."""
        return make_worker(self.worker_id, f"life-{self.life}", epoch=self.epoch)


class DirectoryMachine(RuleBasedStateMachine):
    """Each rule does the same to store and model; the invariants compare all that can be seen."""

    url: str
    num_steps = 0
    """Rules run, over all machines."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.clock = SimulatedClock()
        self.connections = [FaultyRunner.connect(self.url, CONFIG, now_us=self.clock) for _ in range(2)]
        self.stores = [Store(connection) for connection in self.connections]
        self.client = Redis.from_url(self.url)
        self.passed = 0.0  # true time, which every process sees
        self.unseen = 0.0  # wall time since a command last looked at the clock
        self.outage = ""
        self.failed = [False, False]  # whether a replica failed since its last expire
        self.epochs: dict[str, int] = {}
        self.forgotten: set[str] = set()
        """Groups whose epoch the store has lost."""
        self.tokens: set[tuple[str, int]] = set()
        self.processes: dict[str, list[Process]] = {}
        self.data = 0
        self.begin_anew()

    def begin_anew(self) -> None:
        self.data += 1
        self.runner.run(self.lose_everything())
        self.model = Model()
        self.unseen = 0.0
        self.seen = self.runner.run(self.stores[0].state())
        self.followed: dict[str, WorkerInfo] = {}

    async def lose_everything(self) -> None:
        await self.client.flushall()

    def call(self, replica: int, work: Callable[[Store], Awaitable[T]], *, lost: bool = False) -> T:
        """Runs a command that looks at the clock. Raises Unavailable when it was not answered."""
        connection = self.connections[replica]
        connection.loses_reply = lost
        try:
            return self.runner.run(_awaited(work(self.stores[replica])))
        except Unavailable as error:
            self.failed[replica] |= error.reason == "STORE_AWAY"
            raise
        finally:
            connection.loses_reply = False

    def look(self) -> None:
        self.model.look(self.unseen)
        self.unseen = 0.0

    # --- any caller, at any time ---------------------------------------------------------------------------

    @rule(
        worker_id=WORKERS, life=LIVES, epoch=ATTEMPTS, running=st.integers(0, 2), replica=REPLICAS, lost=LOST
    )
    def register(self, worker_id: str, life: str, epoch: int, running: int, replica: int, lost: bool) -> None:
        self.register_worker(make_worker(worker_id, life, epoch=epoch, running=running), replica, lost=lost)

    def register_worker(self, worker: WorkerInfo, replica: int, *, lost: bool) -> bool:
        """Whether it was answered."""
        if not self.outage:
            self.look()
            self.model.put_worker(worker)
        try:
            self.call(replica, lambda store: store.register(worker), lost=lost)
        except Unavailable:
            assert self.outage or lost
            return False
        return True

    @rule(worker_id=WORKERS, life=LIVES, epoch=ATTEMPTS, replica=REPLICAS, lost=LOST)
    def renew(self, worker_id: str, life: str, epoch: int, replica: int, lost: bool) -> None:
        self.renew_worker(make_worker(worker_id, life, epoch=epoch), replica, lost=lost)

    def renew_worker(self, worker: WorkerInfo, replica: int, *, lost: bool) -> int | None:
        """The status; None: the store was away, and the servicer answers DEGRADED."""
        expected = None
        if not self.outage:
            self.look()
            known = self.model.workers.get(worker.worker_id)
            if known is not None and known.epoch == worker.epoch:
                worker.load.CopyFrom(known.load)  # that load alone may lag is another test's subject
            if known is None:
                expected = LEASE_STATUS_NOT_FOUND
            elif known.process_incarnation != worker.process_incarnation:
                expected = LEASE_STATUS_STALE
            else:
                expected = LEASE_STATUS_RENEWED
                self.model.put_worker(worker)
        try:
            (status,) = self.call(replica, lambda store: store.renew([renewal_of(worker)]), lost=lost)
        except Unavailable:
            assert self.outage or lost
            return None
        assert status == expected
        return status

    @rule(worker_id=WORKERS, life=LIVES, replica=REPLICAS)
    def deregister(self, worker_id: str, life: str, replica: int) -> None:
        known = self.model.workers.get(worker_id)
        refusal = None if known and known.process_incarnation == life else Aborted if known else NotFound
        if self.answered(replica, lambda store: store.deregister(worker_id, life), refusal):
            self.model.remove_worker(worker_id)

    def answered(
        self, replica: int, work: Callable[[Store], Awaitable[object]], refusal: type[ServiceError] | None
    ) -> bool:
        """Runs a command that is refused thus, or not; whether it was carried out."""
        expected = Unavailable if self.outage else refusal
        if expected is None:
            self.call(replica, work)
            return True
        with pytest.raises(expected):
            self.call(replica, work)
        return False

    @rule(
        request=REQUESTS, number=ATTEMPTS, epoch=ATTEMPTS, lease=st.sampled_from([1.0, 4.0, 30.0]),
        replica=REPLICAS,
    )  # fmt: skip
    def record(self, request: str, number: int, epoch: int, lease: float, replica: int) -> None:
        record = make_record(request, number, epoch)
        known = self.model.requests.get(request)
        overtaken = known is not None and (known[0], known[1]) > (number, epoch)
        done = self.answered(
            replica, lambda store: store.record(record, lease), Aborted if overtaken else None
        )
        if not self.outage:
            self.look()
        if done:
            self.model.requests[request] = (number, epoch, record)
            self.model.request_leases[request] = self.model.now + lease

    @rule(request=REQUESTS, number=ATTEMPTS, replica=REPLICAS)
    def release(self, request: str, number: int, replica: int) -> None:
        attempt = Attempt(request_id=request, number=number)
        known = self.model.requests.get(request)
        refusal = NotFound if known is None else Aborted if known[0] > number else None
        if self.answered(replica, lambda store: store.release(attempt), refusal):
            del self.model.requests[request], self.model.request_leases[request]

    @rule(
        worker_id=WORKERS, life=LIVES, epoch=ATTEMPTS, layout=st.sampled_from(list(LAYOUTS)),
        keys=st.lists(st.sampled_from(CHAIN), max_size=5), evict=st.booleans(), replica=REPLICAS,
    )  # fmt: skip
    def tell_prefix(
        self, worker_id: str, life: str, epoch: int, layout: str, keys: list[bytes], evict: bool, replica: int
    ) -> None:
        holder = PrefixHolder(
            worker_id=worker_id, process_incarnation=life, epoch=epoch, attention=LAYOUTS[layout]
        )
        known = self.model.workers.get(worker_id)
        refusal: type[ServiceError] | None = None
        if known is None or (known.process_incarnation == life and known.epoch < epoch):
            refusal = NotFound
        elif (known.process_incarnation, known.epoch) != (life, epoch):
            refusal = Aborted
        if self.answered(
            replica,
            lambda store: (store.evict_prefix if evict else store.record_prefix)(holder, keys),
            refusal,
        ):
            told = self.model.prefixes.setdefault((worker_id, layout), {})
            for key in keys:
                if evict:
                    told.pop(key, None)
                else:
                    told[key] = self.model.lives[worker_id]

    @rule(group=st.sampled_from(["g", "h"]), replica=REPLICAS, behind=st.integers(0, 5))
    def draw_epoch(self, group: str, replica: int, behind: int) -> None:
        """By the group's leader, which knows its last epoch unless it has just started."""
        last = self.epochs.get(group, 0)
        previous = 0 if behind == 0 else last
        try:
            epoch = self.call(replica, lambda store: store.draw_epoch(group, previous))
        except Unavailable:
            assert self.outage
            if previous == 0:
                return  # it waits for the directory; with its last epoch it goes on by its own clock
            epoch = max(last + 1, self.clock.us)
        assert epoch > last
        assert (group, epoch) not in self.tokens, "a fencing token came again"
        self.tokens.add((group, epoch))
        self.epochs[group] = epoch
        self.forgotten.discard(group)
        leader = make_worker(f"{group}/0", "leader", epoch=epoch)
        self.register_worker(leader, replica, lost=False)

    # --- workers that mind their fences --------------------------------------------------------------------

    @rule(worker_id=PROCESSES, which=st.sampled_from([-1, -1, -1, 0]), replica=REPLICAS, lost=LOST)
    def heartbeat(self, worker_id: str, which: int, replica: int, lost: bool) -> None:
        """Of the newest process of a worker, or of the first, which may have been replaced while it was paused."""
        lives = self.processes.setdefault(worker_id, [Process(worker_id, 1)])
        self.beat(lives[which], replica, lost=lost)

    def beat(self, process: Process, replica: int, *, lost: bool) -> None:
        if self.outage == "directory":
            return  # no answer
        if not process.leased:
            if self.register_worker(process.info, replica, lost=lost):
                process.leased, process.data = True, self.data
                process.fence.renew(self.passed, CONFIG.lease_ttl_s)
            return
        status = self.renew_worker(process.info, replica, lost=lost)
        if status == LEASE_STATUS_RENEWED:
            process.fence.renew(self.passed, CONFIG.lease_ttl_s)
        elif status is None:
            process.fence.keep(self.passed, CONFIG.lease_ttl_s)
        else:
            process.fence.lose()
            process.leased = False

    @rule(worker_id=PROCESSES)
    def replace(self, worker_id: str) -> None:
        """A new process of the same worker starts; the old one is paused, and does not know."""
        lives = self.processes.setdefault(worker_id, [Process(worker_id, 1)])
        self.processes[worker_id] = [lives[-1], Process(worker_id, lives[-1].life + 1)]

    @invariant()
    def who_believes_in_its_lease_has_one(self) -> None:
        """Else it would act while the others count it as dead. Data that were lost are no death."""
        for lives in self.processes.values():
            process = lives[-1]
            if process.leased and process.data == self.data and process.fence.holds(self.passed):
                known = self.model.workers.get(process.worker_id)
                assert known is not None, f"{process} acts after its lease has ended"
                if len(lives) == 1 or known.process_incarnation != f"life-{lives[0].life}":
                    assert known.process_incarnation == f"life-{process.life}"

    # --- time and faults -----------------------------------------------------------------------------------

    @rule(ticks=st.integers(1, 4), working=st.sampled_from([(0, 1), (0, 1), (0,), (1,)]))
    def time_passes(self, ticks: int, working: tuple[int, ...]) -> None:
        """Replicas that are not among the working pause."""
        for _ in range(ticks):
            self.move(TICK_S)
            self.passed += TICK_S
            self.expire(working)

    def expire(self, replicas: Sequence[int]) -> None:
        for replica in replicas:
            try:
                self.call(replica, lambda store: store.expire())
            except Unavailable:
                assert self.outage
                continue
            self.look()
            self.model.expire(was_away=self.failed[replica])
            self.failed[replica] = False

    @rule(kind=st.sampled_from(["store", "directory"]), ticks=st.integers(1, 5), data=st.data())
    def outage_passes(self, kind: str, ticks: int, data: st.DataObject) -> None:
        """Redis, or all of the directory, is away for some time; workers go on trying."""
        self.begin_outage(kind)
        for _ in range(ticks):
            self.time_passes(1, (0, 1))
            for lives in self.processes.values():
                if data.draw(st.booleans()):
                    self.beat(lives[-1], 0, lost=False)
            self.who_believes_in_its_lease_has_one()
        self.outage = ""
        for connection in self.connections:
            connection.away_now = False

    def begin_outage(self, kind: str) -> None:
        self.outage = kind
        for connection in self.connections:
            connection.away_now = True

    @rule(seconds=st.sampled_from([-3600.0, -10.0, -1.0, 10.0, 3600.0]))
    def clock_jumps(self, seconds: float) -> None:
        self.move(seconds)
        self.keep_clock_past_forgotten()
        self.expire((0, 1))

    @rule()
    def data_are_lost(self) -> None:
        before = self.seen.incarnation
        self.forgotten = set(self.epochs)
        self.keep_clock_past_forgotten()
        self.begin_anew()
        assert self.seen.incarnation != before

    def keep_clock_past_forgotten(self) -> None:
        """Over a loss epochs rest on the wall clock alone: they grow as long as it is not set back as well."""
        before = self.clock.us
        self.clock.us = max([before, *(self.epochs[group] + 1 for group in self.forgotten)])
        self.unseen += (self.clock.us - before) / 1e6

    def move(self, seconds: float) -> None:
        self.clock.move(seconds)
        self.unseen += seconds

    # --- what must hold ------------------------------------------------------------------------------------

    @invariant()
    def store_is_as_the_model(self) -> None:
        type(self).num_steps += 1
        changes, state, found, located = self.runner.run(self.read())
        assert changes is not None
        for change in changes.changes:
            if change.updated is not None:
                self.followed[change.updated.worker_id] = change.updated
            elif change.removed is not None:
                del self.followed[change.removed]
        assert {worker.worker_id: worker for worker in state.workers} == self.model.workers
        assert self.followed == self.model.workers
        assert state.num_requests == len(self.model.requests)
        assert state.recovering == changes.recovering == self.model.recovering
        assert located == [record for _, _, record in self.model.requests.values()]
        lengths = [match.num_keys for match in found]
        assert lengths == sorted(lengths, reverse=True)
        assert {
            (match.holder.worker_id, str(match.holder.attention.WhichOneof("mask"))): match.num_keys
            for match in found
        } == self.model.find(CHAIN)
        self.seen = state

    async def read(self) -> tuple[Changes | None, StoreState, list[PrefixMatch], list[RequestRecord]]:
        first, second = self.stores
        return (
            await first.changes(self.seen.log, self.seen.revision),
            await first.state(),
            await second.find_prefix(CHAIN),
            [(await second.locate(request)).record for request in self.model.requests],
        )

    def teardown(self) -> None:
        self.runner.run(self.client.aclose())
        for store in self.stores:
            self.runner.run(store.close())
        self.runner.close()


async def _awaited(work: Awaitable[T]) -> T:
    return await work


def run_machine(url: str, num_runs: int, num_steps: int, *, shrink: bool = True, seed: int = 0) -> int:
    """Runs that many machines of that many steps, the same ones for a seed; the number of states that were compared.

    Raises:
        AssertionError: store or worker did what they must not; with `shrink` by the shortest way there.
    """
    DirectoryMachine.url, DirectoryMachine.num_steps = url, 0
    run_state_machine_as_test(
        seeded(seed)(DirectoryMachine),
        settings=settings(
            max_examples=num_runs,
            stateful_step_count=num_steps,
            deadline=None,
            database=None,
            phases=[Phase.generate, *([Phase.shrink] if shrink else [])],
            print_blob=False,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return DirectoryMachine.num_steps
