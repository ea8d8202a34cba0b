"""The order between tenants: shares by weight, nobody starves, one tenant alone goes by turns."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hypothesis import given
from hypothesis import strategies as st

from sps2_router.fair_queue import FairQueue, Waiter

TENANTS = ("a", "b", "c")
weights = st.fixed_dictionaries({tenant: st.sampled_from([0.5, 1.0, 2.0, 5.0]) for tenant in TENANTS})
costs = st.integers(1, 1000)


@dataclass
class Step:
    """One waiter comes, leaves unserved, or the first is served and perhaps comes back."""

    kind: str
    tenant: str
    turn: int
    cost: int


steps = st.lists(
    st.builds(
        Step,
        st.sampled_from(["come", "come", "come", "serve", "serve", "leave", "return", "idle"]),
        st.sampled_from(TENANTS),
        st.integers(-5, 5),
        costs,
    ),
    max_size=60,
)


class Replay:
    """Runs steps on a queue and keeps the waiters in plain lists beside it."""

    def __init__(self, weight_of: dict[str, float]) -> None:
        self.queue = FairQueue(weight_of.__getitem__)
        self.waiting: list[Waiter] = []
        self.served: list[Waiter] = []
        self._number = 0

    def come(self, tenant: str, turn: int, cost: int) -> Waiter:
        self._number += 1
        return self._add(Waiter(tenant, (turn, self._number), cost, num_tokens=cost))

    def serve(self) -> Waiter:
        first = self.queue.first_of(is_short=False)
        assert first is not None
        self.queue.serve(first)
        self.waiting.remove(first)
        self.served.append(first)
        return first

    def run(self, script: Sequence[Step]) -> None:
        for step in script:
            if step.kind == "come":
                self.come(step.tenant, step.turn, step.cost)
            elif step.kind == "serve" and self.waiting:
                self.serve()
            elif step.kind == "leave" and self.waiting:
                leaving = self.waiting.pop(step.cost % len(self.waiting))
                self.queue.remove(leaving)
            elif step.kind == "return" and self.served:
                self._number += 1
                back = self.served.pop()
                self._add(replace(back, turn=(back.turn[0], self._number), paid=True))
            elif step.kind == "idle" and not self.waiting:
                self.queue.forget()

    def drain(self) -> list[Waiter]:
        return [self.serve() for _ in range(len(self.waiting))]

    def _add(self, waiter: Waiter) -> Waiter:
        self.queue.add(waiter)
        self.waiting.append(waiter)
        return waiter


@given(weights, steps)
def test_it_always_has_a_first_while_somebody_waits(weight_of: dict[str, float], script: list[Step]) -> None:
    replay = Replay(weight_of)
    for step in script:
        replay.run([step])
        assert (replay.queue.first_of(is_short=False) is not None) == bool(replay.waiting)
    waiting = set(replay.waiting)
    assert set(replay.drain()) == waiting
    assert replay.queue.first_of(is_short=False) is None


@given(weights, steps, st.sampled_from(TENANTS), st.integers(-5, 5), costs)
def test_who_is_before_one_is_foreseen(
    weight_of: dict[str, float], script: list[Step], tenant: str, turn: int, cost: int
) -> None:
    """Also for one that only thinks of coming, and what is foreseen changes nothing."""
    replay = Replay(weight_of)
    replay.run(script)
    newcomer = Waiter(tenant, (turn, 10**6), cost)
    before_it = set(replay.queue.before(newcomer))
    replay.queue.add(newcomer)
    replay.waiting.append(newcomer)
    foreseen = {one: set(replay.queue.before(one)) for one in replay.waiting}
    assert foreseen[newcomer] == before_it
    order = replay.drain()
    assert {one: set(order[: order.index(one)]) for one in order} == foreseen


@given(weights, steps, st.lists(costs, min_size=20, max_size=60), st.data())
def test_shares_follow_the_weights_while_all_wait(
    weight_of: dict[str, float], script: list[Step], sizes: list[int], data: st.DataObject
) -> None:
    """In any stretch in which both wait, two tenants' service differs by at most one largest request of each."""
    replay = Replay(weight_of)
    replay.run(script)
    replay.drain()
    for tenant in TENANTS:
        for size in sizes:
            replay.come(tenant, 0, size)
    backlog = {tenant: len(sizes) for tenant in TENANTS}
    order: list[Waiter] = []
    while all(backlog.values()):
        order.append(replay.serve())
        backlog[order[-1].tenant] -= 1
    begin = data.draw(st.integers(0, len(order)))
    end = data.draw(st.integers(begin, len(order)))
    largest = {tenant: max(sizes) / weight_of[tenant] for tenant in TENANTS}
    got = {
        tenant: sum(one.cost for one in order[begin:end] if one.tenant == tenant) / weight_of[tenant]
        for tenant in TENANTS
    }
    for one, other in (("a", "b"), ("b", "c"), ("a", "c")):
        assert abs(got[one] - got[other]) <= largest[one] + largest[other] + 1e-6


@given(weights, steps, costs)
def test_nobody_starves(weight_of: dict[str, float], script: list[Step], cost: int) -> None:
    """However fast the others come, one that waits is served after a bounded amount of their work."""
    replay = Replay(weight_of)
    replay.run(script)
    ahead = sum(one.cost for one in replay.waiting)
    late = replay.come("a", 100, cost)
    rounds = 0
    while late in replay.waiting:
        rounds += 1
        for tenant in ("b", "c"):
            replay.come(tenant, -100, 1000)
        assert replay.serve().tenant
        # Its own tenant's work that goes before it, and as much for the others by their weights, and one of each.
        share = (ahead + 1000 + cost) / weight_of["a"] * (weight_of["b"] + weight_of["c"])
        assert rounds <= len(script) + 4 + (share + ahead) / 1000 + len(TENANTS)


@given(steps)
def test_one_tenant_alone_goes_by_turns(script: list[Step]) -> None:
    replay = Replay({"a": 3.0})
    replay.run([replace(step, tenant="a") for step in script])
    turns = [one.turn for one in replay.drain()]
    assert turns == sorted(turns)


@given(weights, steps)
def test_one_that_comes_back_goes_first_and_pays_nothing(
    weight_of: dict[str, float], script: list[Step]
) -> None:
    with_it, without = Replay(weight_of), Replay(weight_of)
    for replay in (with_it, without):
        replay.run([step for step in script if step.kind != "return"])
    back = Waiter("b", (-100, 0), 10**9, paid=True)
    with_it.queue.add(back)
    assert with_it.queue.first_of(is_short=False) is back
    with_it.queue.serve(back)
    assert [one.turn for one in with_it.drain()] == [one.turn for one in without.drain()]
