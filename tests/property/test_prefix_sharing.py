"""Prompts that begin alike, in any order of events: ranks count as the leader does, and no row reads another's KV.

The leader's scheduler and messages are the real ones, and so are each rank's pool, arena and rows; KV comes at once,
a number for each token that tells the prompt's beginning up to it.
"""

import zlib
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sps2.internal.v1 import engine_pb2
from sps2.internal.v1.decode_service_pb2 import ReserveKv
from sps2.internal.v1.placement_pb2 import Attempt, Fence
from sps2.internal.v1.prefill_service_pb2 import TokenChoice
from sps2.v1.generation_pb2 import SamplingSpec
from sps2_decode_worker.messages import FormedGroup, reserve_message
from sps2_decode_worker.placing import Asked
from sps2_decode_worker.receive import Receiver
from sps2_decode_worker.rows import RowState
from sps2_decode_worker.scheduler import DecodeScheduler, NeverFitsError, NoRoomError, Plan, Row
from sps2_decode_worker.scheduler import RowState as State
from sps2_decode_worker.sharing import Prefix
from sps2_engine.kv_pool import BLOCK_TOKENS, BlockPool, KvArena, slot_runs
from sps2_layout.block_hash import block_hashes

NUM_BLOCKS = (14, 14)
CPU = torch.device("cpu")


def marks(token_ids: Sequence[int]) -> list[float]:
    """What stands for the KV of each token: it depends on all tokens up to it."""
    chain = accumulate(token_ids, lambda so_far, token: zlib.crc32(bytes([token]), so_far), initial=0)
    return [float(mark & 0xFFFFFF) for mark in chain][1:]


class Arrivals:
    """In place of a KvReceiver: notes where an attempt's KV is to go."""

    def __init__(self) -> None:
        self.expected: dict[str, tuple[int, int, Sequence[int]]] = {}

    def expect(
        self, fence: Fence, begin: int, end: int, blocks: Sequence[int], _on_complete: Callable[[], None]
    ) -> None:
        """See KvReceiver."""
        self.expected[fence.attempt.request_id] = (begin, end, blocks)

    def forget(self, fence: Fence) -> None:
        """See KvReceiver."""
        self.expected.pop(fence.attempt.request_id, None)


class Rank:
    """One rank: executes plans as the decode engine does, without a model."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.arrivals = Arrivals()
        self.pool = BlockPool(NUM_BLOCKS[rank])
        self.arena = KvArena(1, NUM_BLOCKS[rank], 1, 1)
        self.receiver = Receiver.__new__(Receiver)
        self.receiver._pool, self.receiver._arena = self.pool, self.arena
        self.receiver._receiver = self.arrivals  # type: ignore[assignment]
        self.rows: dict[int, RowState] = {}

    def execute(self, plan: Plan, reserve: Sequence[engine_pb2.ReserveRow], skipped: set[int]) -> None:
        """In the order of `DecodeRole.execute`."""
        held = [self.receiver.hold(one, self.rank, self.rows) for one in reserve]
        for row_id in set(plan.release) - skipped:
            self.receiver.release(self.rows.pop(row_id))
        for one, blocks in zip(reserve, held, strict=True):
            rows = self.receiver.reserve(one, self.rank, blocks, lambda: None)
            self.rows.update({row.row_id: row for row in rows})
        for row_id in plan.admit:
            if row_id in self.rows:
                self.receiver.copy_prompt(self.rows[row_id])
                self.rows[row_id].admit(0, CPU)
        if plan.run:
            for row in self.rows.values():
                if row.admitted and row.is_home:
                    self.receiver.extend(row)
                    self.arena.k[0, row.append_slot()] = -float(row.row_id)
        self.receiver.check(self.rows.values(), plan.blocks_used[self.rank])

    def deliver(self, request_id: str, values: Sequence[float]) -> None:
        """The KV of an attempt comes, where it is expected."""
        if request_id in self.arrivals.expected:
            begin, end, blocks = self.arrivals.expected[request_id]
            slots = [slot for run in slot_runs(blocks, end - begin) for slot in range(*run)]
            self.arena.k[0, slots, 0, 0] = torch.tensor(values[begin:end])

    def read(self, row_id: int) -> list[float]:
        """All that attention reads of a row here."""
        slots = [slot for run in self.rows[row_id].runs() for slot in range(*run)]
        return [float(value) for value in self.arena.k[0, slots, 0, 0]]


class SharingMachine(RuleBasedStateMachine):
    """Prompts of few families come, decode, end and are preempted."""

    def __init__(self) -> None:
        super().__init__()
        self.num_requests = 0
        self.prompts: dict[int, list[int]] = {}
        """By row."""
        self.messages: dict[int, engine_pb2.ReserveRow] = {}
        self.form()

    def form(self) -> None:
        """A group forms: nothing is held, nothing known."""
        self.scheduler = DecodeScheduler(NUM_BLOCKS, BLOCK_TOKENS, 64)
        self.ranks = [Rank(rank) for rank in range(len(NUM_BLOCKS))]
        self.known: dict[int, Row] = {}

    @rule(
        family=st.integers(0, 2),
        common=st.integers(0, 5),
        rest=st.integers(0, 150),
        more=st.integers(1, 200),
        choices=st.integers(1, 2),
        came=st.integers(0, 20),
    )
    def reserve(self, family: int, common: int, rest: int, more: int, choices: int, came: int) -> None:
        self.num_requests += 1
        prompt = [family] * (common * BLOCK_TOKENS) + [(self.num_requests + 3) % 256] * rest or [family]
        prefix = Prefix(None, tuple(block_hashes(prompt, "model", b"")))
        try:
            rows = self.scheduler.reserve(Asked(len(prompt), more, choices, prefix), came, str(came))
        except (NoRoomError, NeverFitsError):
            return
        request = ReserveKv(
            attempt=Attempt(request_id=str(self.num_requests), number=1),
            num_prompt_tokens=len(prompt),
            choice=TokenChoice(sampling=SamplingSpec(top_p=1), max_tokens=more, num_choices=choices),
        )
        group = FormedGroup("decode-0", 1, [engine_pb2.EngineLoaded()] * len(NUM_BLOCKS))
        message = reserve_message(group, request, rows)
        for row in rows:
            self.known[row.row_id] = row
            self.prompts[row.row_id] = prompt
            self.messages[row.row_id] = message

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        """All of an attempt's KV has come; its rows decode."""
        tenant = self.known[data.draw(st.sampled_from(sorted(self.known)))].tenant
        self.run_plans()
        rows = [row for row in tenant.rows if row.state is State.RESERVED]
        for row in rows[:1]:
            for rank in self.ranks:
                rank.deliver(self.messages[row.row_id].attempt.request_id, marks(self.prompts[row.row_id]))
        for row in rows:
            self.scheduler.admit(row.row_id)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        """One choice ends, after the commit."""
        row = self.known[data.draw(st.sampled_from(sorted(self.known)))]
        if row.state is State.ACTIVE:
            self.scheduler.release(row.row_id)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        """An attempt ends, at any time."""
        for row in list(self.known[data.draw(st.sampled_from(sorted(self.known)))].tenant.rows):
            self.scheduler.release(row.row_id)

    @rule()
    def reset(self) -> None:
        """The epoch ends: every row is released, and nothing is left."""
        for rank in self.ranks:
            for row in rank.rows.values():
                rank.receiver.release(row)
            rank.pool.check()
            assert rank.pool.num_used == 0
        self.form()

    @rule(steps=st.integers(1, 90))
    def steps(self, steps: int) -> None:
        for _ in range(steps):
            self.scheduler.steps_in_flight = 0
            self.execute()

    @rule()
    def run_plans(self) -> None:
        while self.execute():
            pass

    def execute(self) -> bool:
        """The next plan, on all ranks; whether there was one."""
        plan = self.scheduler.next_plan()
        if plan is None:
            return False
        skipped = set(plan.reserve) & set(plan.release)
        # A message reserves all rows of an attempt.
        told = [self.messages[row_id] for row_id in plan.reserve if self.messages[row_id].row == row_id]
        reserve = [one for one in told if one.row not in skipped]
        for rank in self.ranks:
            rank.execute(plan, reserve, skipped)
        return True

    @invariant()
    def blocks_are_counted(self) -> None:
        tenants = {row.tenant for row in self.scheduler.rows.values()}
        runs = {run for tenant in tenants for run in tenant.prompt.runs}
        for run in runs:
            assert run.users == {tenant.prompt for tenant in tenants if run in tenant.prompt.runs}
        for rank, total in enumerate(NUM_BLOCKS):
            used = sum(run.num_blocks for run in runs if run.rank == rank)
            used += sum(tenant.own(rank) for tenant in tenants)
            assert self.scheduler.free[rank] == total - used >= 0
        for tenant in tenants:
            for rank in tenant.places.holders:
                shared = sum(run.num_blocks for run in tenant.prompt.runs if run.rank == rank)
                assert shared == tenant.places.shared[rank]

    @invariant()
    def rows_read_their_own(self) -> None:
        for row_id, row in self.scheduler.rows.items():
            here = [rank for rank in self.ranks if row_id in rank.rows and rank.rows[row_id].admitted]
            if row.state is State.ACTIVE and here:
                read = [value for rank in here for value in rank.read(row_id)]
                own = [value for value in read if value < 0]
                assert sorted(value for value in read if value >= 0) == sorted(marks(self.prompts[row_id]))
                assert set(own) <= {-float(row_id)}


TestSharingMachine = SharingMachine.TestCase
TestSharingMachine.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
