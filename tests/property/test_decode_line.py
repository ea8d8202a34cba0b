"""Who waits for whom: earlier requests are not held up by later ones, short ones not by long ones; and replay."""

from contextlib import suppress
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sps2_decode_worker.placing import Asked, BlockCounts, place
from sps2_decode_worker.scheduler import (
    MAX_PASSED,
    DecodeScheduler,
    NeverFitsError,
    NoRoomError,
    Plan,
    Row,
    RowState,
)

BLOCK = 64
PREFILL_TICKS = 2


@dataclass(eq=False)
class Client:
    """A request that asks at every tick until it has all of its tokens."""

    turn: int
    """Also the tick at which it comes."""
    num_prompt: int
    max_tokens: int
    num_tokens: int = 0
    row: Row | None = None
    ready_at: int = 0
    first_since: int | None = None
    """Tick at which it had to wait for none before it; None while it has, and while it is in."""
    num_refused: int = 0
    num_preempted: int = 0

    @property
    def done(self) -> bool:
        return self.num_tokens == self.max_tokens


class Group:
    """A decode group of which every step is done at once, and its clients."""

    def __init__(self, *blocks: int) -> None:
        self.scheduler = DecodeScheduler(blocks, BLOCK, 128)
        self.clients: list[Client] = []
        self.now = 0

    def tick(self, order: list[Client] | None = None) -> None:
        """Everybody asks, in order or as they came; then one step."""
        for client in order or self.clients:
            if client.row is None and client.turn <= self.now:
                self._ask(client)
            row = client.row
            if row is not None and self.now >= client.ready_at and row.state is RowState.RESERVED:
                client.num_tokens += 1
                self.scheduler.admit(row.row_id)
        active = {row.row_id for row in self.scheduler.rows.values() if row.state is RowState.ACTIVE}
        plan = self.scheduler.next_plan()
        if plan is not None and plan.run:
            self.scheduler.step_done()
        for client in self.clients:
            if plan is not None and client.row is not None:
                self._look(client, client.row, plan.run and client.row.row_id in active - {*plan.preempted})
        self.clients = [client for client in self.clients if not client.done]
        self.now += 1

    def _ask(self, client: Client) -> None:
        asked = Asked(client.num_prompt + client.num_tokens, client.max_tokens - client.num_tokens)
        try:
            (client.row,) = self.scheduler.reserve(asked, client.turn, str(client.turn))
        except NoRoomError:
            client.num_refused += 1
            is_first = not any(one.turn < client.turn <= self.now for one in self.clients)
            client.first_since = (client.first_since or self.now) if is_first else None
        else:
            client.ready_at, client.first_since = self.now + PREFILL_TICKS, None

    def _look(self, client: Client, row: Row, made_token: bool) -> None:
        client.num_tokens += made_token
        if client.done:
            self.scheduler.release(row.row_id)
            client.row = None
        elif row.row_id not in self.scheduler.rows:
            client.row, client.num_preempted = None, client.num_preempted + 1


sizes = st.tuples(st.integers(1, 400), st.integers(2, 40))


@settings(max_examples=20, deadline=None)
@given(
    st.lists(sizes, min_size=2, max_size=7), st.sampled_from([(12,), (8, 8), (5, 5, 5)]), st.integers(0, 99)
)
def test_nobody_waits_for_more_than_a_few_later_ones(
    asked: list[tuple[int, int]], totals: tuple[int, ...], seed: int
) -> None:
    """Each is asked for again and again, so that there is always a later one that would take the room."""
    fresh = BlockCounts(totals, totals, (0,) * len(totals))
    asked = [size for size in asked if place(Asked(*size), fresh, BLOCK, 128) is not None]
    group, random = Group(*totals), Random(seed)
    longest = PREFILL_TICKS + max((most for _, most in asked), default=0)
    for size in 2 * asked:
        group.clients.append(Client(group.now, *size))
        for _ in range(random.randint(1, 20)):
            group.tick(random.sample(group.clients, len(group.clients)))
            assert all(
                group.now - one.first_since <= (1 + MAX_PASSED) * longest
                for one in group.clients
                if one.first_since is not None
            )
    while group.clients:
        group.tick(random.sample(group.clients, len(group.clients)))
        assert group.now < 100 * 2 * (1 + len(asked)), f"still not done: {group.clients}"


def test_a_stream_of_short_ones_does_not_hold_up_a_long_one() -> None:
    """Nor does the long one, while it waits for an earlier one, hold up what fits beside it."""
    group = Group(100)
    earlier, long = Client(0, 60 * BLOCK, 150), Client(1, 50 * BLOCK, 100)
    group.clients = [earlier, long]
    shorts = _stream_until(group, long, every=2)
    assert earlier.done
    assert group.now <= PREFILL_TICKS + 150 + 1
    assert not any(short.num_refused or short.num_preempted for short in shorts)


def test_what_needs_all_is_passed_a_few_times() -> None:
    group = Group(100)
    earlier, long = Client(0, 60 * BLOCK, 150), Client(1, 98 * BLOCK, 100)
    group.clients = [earlier, long]
    shorts = _stream_until(group, long, every=2)
    assert earlier.done
    assert group.now <= PREFILL_TICKS + 150 + 1
    assert sum(short.done for short in shorts) == MAX_PASSED
    assert not any(short.num_preempted for short in shorts)


def _stream_until(group: Group, long: Client, every: int) -> list[Client]:
    """A short request every few ticks until the long one is in."""
    shorts = []
    while long.row is None and group.now < 1_000:
        if group.now > 1 and group.now % every == 0:
            shorts.append(Client(group.now, BLOCK, 20))
            group.clients.append(shorts[-1])
        group.tick()
    return shorts


@pytest.mark.parametrize("seed", range(20))
def test_the_same_events_make_the_same_plans(seed: int) -> None:
    first, second = (_played(Random(seed)) for _ in range(2))
    assert first == second
    assert any(plan.preempted for plan, _ in first)


def _played(random: Random) -> list[tuple[Plan, tuple[int, ...]]]:
    """The plans that a group makes of random events."""
    scheduler = DecodeScheduler((20, 30, 25), BLOCK, 128)
    plans = []
    for _ in range(600):
        rows = sorted(scheduler.rows)
        event = random.random()
        if event < 0.2:
            asked = Asked(random.randint(1, 900), random.randint(1, 400), random.randint(1, 3))
            with suppress(NoRoomError, NeverFitsError):
                scheduler.reserve(asked, random.randint(0, 50), str(random.randint(0, 9)))
        elif event < 0.25:
            scheduler.leave_line(str(random.randint(0, 9)))
        elif rows and event < 0.4:
            if scheduler.rows[row_id := random.choice(rows)].state is RowState.RESERVED:
                scheduler.admit(row_id)
        elif rows and event < 0.42:
            scheduler.release(random.choice(rows))
        elif scheduler.steps_in_flight and event < 0.7:
            scheduler.step_done()
        elif (plan := scheduler.next_plan()) is not None:
            plans.append((plan, plan.blocks_used))
    return plans
