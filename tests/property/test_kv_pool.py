"""The block pool under any sequence of allocations and frees."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from sps2_engine.kv_pool import BlockPool, OutOfBlocksError


class PoolMachine(RuleBasedStateMachine):
    """A pool beside the plain list of blocks that are out, once for each owner."""

    allocations = Bundle("allocations")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(24)
        self.out: list[int] = []

    @rule(target=allocations, count=st.integers(0, 12))
    def allocate(self, count: int) -> object:
        free = set(range(24)) - set(self.out)
        try:
            blocks = self.pool.allocate(count)
        except OutOfBlocksError:
            assert count > len(free)
            return multiple()
        assert len(blocks) == len(set(blocks)) == count
        assert free.issuperset(blocks)
        if _has_run(free, count):
            assert blocks == list(range(blocks[0], blocks[0] + count)) if blocks else count == 0
        self.out += blocks
        return blocks

    @rule(target=allocations, blocks=allocations, data=st.data())
    def share(self, blocks: list[int], data: st.DataObject) -> list[int]:
        shared = blocks[: data.draw(st.integers(0, len(blocks)))]
        self.pool.share(shared)
        self.out += shared
        return shared

    @rule(blocks=consumes(allocations), data=st.data())
    def free(self, blocks: list[int], data: st.DataObject) -> None:
        self.pool.free(data.draw(st.permutations(blocks)))
        for block in blocks:
            self.out.remove(block)

    @invariant()
    def holds(self) -> None:
        self.pool.check()
        assert self.pool.num_used == len(set(self.out))
        assert self.pool.num_free == 24 - len(set(self.out))


def _has_run(free: set[int], count: int) -> bool:
    return any(free.issuperset(range(begin, begin + count)) for begin in range(25 - count))


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(st.permutations(range(12)))
def test_blocks_freed_in_any_order_become_one_run_again(order: list[int]) -> None:
    pool = BlockPool(12)
    pool.allocate(12)
    for block in order:
        pool.free([block])
        pool.check()
    assert pool.allocate(12) == list(range(12))
