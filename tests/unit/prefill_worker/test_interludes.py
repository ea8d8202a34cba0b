"""How often short prompts go between the slices of a long one, and that ranks take the same ones."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sps2.internal.v1 import engine_pb2
from sps2_engine.collectives import GroupError
from sps2_prefill_worker.costs import SHORT_SLICES
from sps2_prefill_worker.interludes import FairShare, ShortWork, ToldRuns, short_work

SLICE = 100
TIMEOUT_S = 10.0

works = st.builds(ShortWork, st.integers(1, SHORT_SLICES * SLICE), st.one_of(st.none(), st.integers(0, 2)))


def busiest(gap: list[ShortWork]) -> int:
    """Work of the rank that has most, by the definition."""
    return max(sum(work.flops for work in gap if work.alone_on in (None, rank)) for rank in range(3))


@given(st.lists(works, max_size=15))
def test_neither_starves(queue: list[ShortWork]) -> None:
    share, waited = FairShare(SLICE), 0
    gaps: list[int] = []
    while queue:
        share.earn()
        num_taken = share.afford(queue)
        gap, queue = queue[:num_taken], queue[num_taken:]
        gaps.append(busiest(gap) if gap else 0)
        waited = 0 if gap else waited + 1
        assert waited < SHORT_SLICES, "the first in line has waited for long enough"
        for begin in range(len(gaps)):
            assert sum(gaps[begin:]) <= (len(gaps) - begin + SHORT_SLICES) * SLICE


def test_ranks_that_work_at_once_cost_the_long_prompt_once() -> None:
    share = FairShare(SLICE)
    assert share.afford([ShortWork(200, 0), ShortWork(200, 1), ShortWork(1, 2), ShortWork(1)]) == 3
    assert share.afford([ShortWork(1, 0)]) == 0, "it is used up"
    share.earn()
    assert share.afford([ShortWork(60), ShortWork(40, 1), ShortWork(1, 1)]) == 2


def run(number: int, interlude_flops: int = 5) -> engine_pb2.RunPrefill:
    made = engine_pb2.RunPrefill(number=number, interlude_flops=interlude_flops)
    made.attempt.request_id, made.attempt.number = f"request-{number}", 1
    return made


def test_what_has_gone_before_its_turn_does_not_go_again() -> None:
    told = ToldRuns(TIMEOUT_S)
    for number in (1, 2, 3):
        told.add(run(number))
    assert [one.number for one in told.take(2)] == [1, 2]
    assert [told.begin(run(number)) for number in (1, 2, 3)] == [False, False, True]


def test_only_short_ones_pass_and_none_passes_a_long_one() -> None:
    told = ToldRuns(TIMEOUT_S)
    told.add(run(1))
    told.add(run(2, interlude_flops=0))
    told.add(run(3))
    assert [one.number for one in told.short_ones()] == [1]
    assert told.knows(("request-3", 1))
    assert not told.knows(("request-3", 2))


def test_a_rank_that_knows_nothing_yet_waits_for_the_word() -> None:
    told = ToldRuns(TIMEOUT_S)
    taken: list[int] = []
    taking = threading.Thread(target=lambda: taken.extend(one.number for one in told.take(2)))
    taking.start()
    told.add(run(1))
    told.add(run(2))
    taking.join(TIMEOUT_S)
    assert taken == [1, 2]


def test_nobody_waits_for_the_word_of_an_epoch_that_is_over() -> None:
    told = ToldRuns(TIMEOUT_S)
    failed = threading.Event()

    def take() -> None:
        with pytest.raises(GroupError):
            told.take(1)
        failed.set()

    taking = threading.Thread(target=take)
    taking.start()
    told.end()
    assert failed.wait(TIMEOUT_S)
    taking.join(TIMEOUT_S)
    told.clear()
    told.add(run(1))
    assert [one.number for one in told.take(1)] == [1]
    with pytest.raises(GroupError):
        ToldRuns(timeout_s=0).take(1)


def test_work_says_where_it_is_done() -> None:
    alone = run(1)
    alone.alone_on = 0
    assert list(short_work([alone, run(2)])) == [ShortWork(5, 0), ShortWork(5)]
