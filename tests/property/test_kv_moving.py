"""Any order of resizes, arrivals, ends and preemptions, of prompts that may begin alike.

Every token's KV lies once, where the leader thinks; no row reads that of another text.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sps2_decode_worker.placing import Asked
from sps2_decode_worker.resizing import NotMovableError
from sps2_decode_worker.scheduler import DecodeScheduler, NeverFitsError, NoRoomError
from sps2_decode_worker.sharing import Prefix
from sps2_decode_worker.spread import TooShortError
from sps2_decode_worker.tenants import Row, RowState, Tenant
from sps2_layout.block_hash import block_hashes
from support.decode_ranks import Attempt, DecodeRanks, prompt_marks, reserve_message

BLOCK = 64
TOTALS = (9, 14, 11)


class MovingMachine(RuleBasedStateMachine):
    """A leader's scheduler over ranks that do as they are told, small ones, so that rows grow into each other."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = DecodeScheduler(TOTALS, BLOCK, 64, blocks_per_plan=2)
        self.ranks = DecodeRanks(TOTALS)
        self.attempts: dict[int, Attempt] = {}
        self.num_asked = 0

    @rule(
        common=st.integers(0, 5),
        rest=st.integers(0, 300),
        more=st.integers(1, 400),
        choices=st.integers(1, 3),
        came=st.integers(0, 20),
    )
    def reserve(self, common: int, rest: int, more: int, choices: int, came: int) -> None:
        self.num_asked += 1
        prompt = [0] * (common * BLOCK) + [1 + self.num_asked % 255] * rest or [0]
        asked = Asked(len(prompt), more, choices, Prefix(None, tuple(block_hashes(prompt, "model", b""))))
        try:
            rows = self.scheduler.reserve(asked, came, f"{common} {rest} {more} {came}")
        except (NoRoomError, NeverFitsError):
            return
        self.attempts[rows[0].row_id] = Attempt(reserve_message(rows), prompt)

    @property
    def tenants(self) -> list[Tenant]:
        return list(dict.fromkeys(row.tenant for row in self.scheduler.rows.values()))

    @precondition(lambda self: self.scheduler.rows)
    @rule(data=st.data())
    def admit(self, data: st.DataObject) -> None:
        tenant = data.draw(st.sampled_from(self.tenants))
        for row in tenant.rows:
            if row.state is RowState.RESERVED and row.row_id in self.ranks.rows[0]:
                self.scheduler.admit(row.row_id)

    @precondition(lambda self: self.scheduler.rows)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        row = self.scheduler.rows[data.draw(st.sampled_from(sorted(self.scheduler.rows)))]
        # One choice may end while others go on, but not before all have copied the end of the prompt.
        here = self.ranks.rows[0].get(row.row_id)
        for one in [row] if here and here.admitted else list(row.tenant.rows):
            self.scheduler.release(one.row_id)

    @precondition(lambda self: self.scheduler.rows)
    @rule(data=st.data(), ranks=st.sets(st.integers(0, len(TOTALS) - 1), min_size=1))
    def resize(self, data: st.DataObject, ranks: set[int]) -> None:
        row_id = data.draw(st.sampled_from(sorted(self.scheduler.rows)))
        chosen = data.draw(st.sampled_from([(), tuple(sorted(ranks))]))
        try:
            self.scheduler.resize(row_id, len(ranks), chosen)
        except (NotMovableError, TooShortError, NoRoomError):
            return

    @rule(steps=st.integers(1, 90))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.scheduler.steps_in_flight = 0
            plan = self.scheduler.next_plan()
            if plan is None:
                return
            self.ranks.execute(plan, self.attempts)

    @invariant()
    def blocks_are_counted(self) -> None:
        runs = {run for tenant in self.tenants for run in tenant.prompt.runs}
        for run in runs:
            assert run.users == {tenant.prompt for tenant in self.tenants if run in tenant.prompt.runs}
        for rank, total in enumerate(TOTALS):
            held = sum(run.num_blocks for run in runs if run.rank == rank)
            held += sum(tenant.own(rank) for tenant in self.tenants)
            assert self.scheduler.free[rank] + held == total
            assert self.scheduler.free[rank] >= 0
            for tenant in self.tenants:
                of_prompt = sum(run.num_blocks for run in tenant.prompt.runs if run.rank == rank)
                assert of_prompt == tenant.spread.prompt_blocks(rank)

    @invariant()
    def every_token_lies_where_the_leader_thinks(self) -> None:
        for row in self.scheduler.rows.values():
            if all(row.row_id in rows for rows in self.ranks.rows) and row.state is RowState.ACTIVE:
                self._check(row)

    def _check(self, row: Row) -> None:
        num_prompt, places = row.tenant.places.num_tokens, []
        text = prompt_marks(self.attempts[row.tenant.number].prompt)
        num_tokens = num_prompt + row.num_planned - 1
        for rank, rows in enumerate(self.ranks.rows):
            here = rows[row.row_id]
            if not here.admitted:
                return  # its plan has not gone out
            assert len(here.blocks) == row.blocks.get(rank, 0)
            marks = self.ranks.marks(rank, row.row_id)
            assert all(who == (text[place] if place < num_prompt else row.row_id) for who, place in marks)
            spans = row.tenant.spread.tokens_on(rank, num_tokens)
            assert sorted(place for _, place in marks) == [at for span in spans for at in range(*span)]
            places += [place for _, place in marks]
            assert here.is_home == (rank == row.home)
            assert bool(here.token_ids) == here.is_home
            if here.is_home:
                assert here.token_ids == list(range(row.num_planned))
        assert sorted(places) == list(range(num_tokens))

    def teardown(self) -> None:
        for row_id in list(self.scheduler.rows):
            self.scheduler.release(row_id)
        self.scheduler.steps_in_flight = 0
        while (plan := self.scheduler.next_plan()) is not None:
            self.ranks.execute(plan, self.attempts)
        assert self.scheduler.free == list(TOTALS)
        assert [one.blocks_used for one in self.ranks.receivers] == [0] * len(TOTALS)
        self.ranks.close()


TestMovingMachine = MovingMachine.TestCase
TestMovingMachine.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
