"""The pure prefill scheduler."""

from dataclasses import replace
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from sps2_prefill_worker.scheduler import Job, PrefillScheduler, Start

A, B, C = (Job((name, 1), tokens) for name, tokens in (("a", 10), ("b", 20), ("c", 30)))
SHORT_FLOPS = 100


def short(name: str, flops: int, *, alone: bool = True, num_blocks: int = 1) -> Job:
    return Job((name, 1), 5, flops, alone, num_blocks)


def scheduler(*jobs: Job, num_ranks: int = 2, kv_blocks: int = 100) -> PrefillScheduler:
    made = PrefillScheduler(num_ranks, SHORT_FLOPS, kv_blocks)
    for job in jobs:
        made.submit(job)
    return made


def start_all(one: PrefillScheduler) -> list[tuple[str, int | None]]:
    """Names of what starts now, and on which rank each is alone."""
    started = []
    while (start := one.start_next()) is not None:
        started.append((start.job.key[0], start.alone_on))
    return started


def test_one_long_prompt_computes_at_a_time_in_order() -> None:
    one = scheduler(A, B, C)
    assert one.num_tokens == 60
    assert start_all(one) == [("a", None)]
    one.computed(B.key)  # not the one that computes
    assert one.start_next() is None
    one.computed(A.key)
    assert one.start_next() == Start(B)
    assert one.num_tokens == 50


def test_a_waiting_prompt_can_be_withdrawn_a_computing_one_cannot() -> None:
    one = scheduler(A, B, C)
    assert one.start_next() == Start(A)
    assert one.withdraw(B.key)
    assert not one.withdraw(B.key)
    assert not one.withdraw(A.key)
    one.computed(A.key)
    assert one.start_next() == Start(C)


def test_a_prompt_that_is_fetched_has_its_place_and_short_ones_pass() -> None:
    one = scheduler(
        replace(A, number=1, is_fetching=True), replace(B, number=2), replace(short("s", 1), number=3)
    )
    assert start_all(one) == [("s", 0)]
    assert one.withdraw(A.key)
    one.submit(replace(short("a", 1), number=1))  # with what has come it is short
    assert start_all(one) == [("a", 1), ("b", None)]


def test_who_has_more_to_do_than_it_stood_in_line_for_keeps_its_place() -> None:
    one = scheduler(replace(B, number=2), replace(C, number=3))
    one.submit(replace(A, number=1))
    assert [job.key for job in one.waiting] == [A.key, B.key, C.key]


def test_clear_forgets_everything() -> None:
    one = scheduler(A, B, short("s", 10))
    start_all(one)
    one.clear()
    assert one.num_tokens == 0
    assert one.start_next() is None
    one.submit(short("s", SHORT_FLOPS))
    assert start_all(one) == [("s", 0)], "no rank has anything to do"


def test_short_prompts_do_not_wait_for_long_ones_that_compute() -> None:
    one = scheduler(A, B, short("s", 10), short("t", 10, alone=False))
    assert start_all(one) == [("a", None), ("s", 0), ("t", None)]


def test_a_long_prompt_waits_for_short_ones_before_it_to_be_handed_out() -> None:
    one = scheduler(short("s", 80, alone=False), short("t", 80, alone=False), A, short("u", 1))
    assert start_all(one) == [("s", None)]
    one.computed(("s", 1))
    assert start_all(one) == [("t", None), ("a", None), ("u", 0)]


def test_ranks_compute_several_at_once() -> None:
    one = scheduler(*(short(name, 60) for name in "stuv"))
    assert start_all(one) == [("s", 0), ("t", 1)], "the rest waits where it can be withdrawn"
    one.computed(("t", 1))
    assert start_all(one) == [("u", 1)]
    assert one.withdraw(("v", 1))


def test_short_prompts_that_do_not_fit_beside_a_long_one_wait_for_it() -> None:
    long = Job(("long", 1), 1000, num_blocks=8)
    one = scheduler(long, short("s", 10, num_blocks=2), short("t", 10), kv_blocks=10)
    assert start_all(one) == [("long", None), ("s", 0)]
    one.computed(("s", 1))
    assert start_all(one) == [], "its KV is still on its way"
    one.over(("s", 1))
    assert start_all(one) == [("t", 0)]


jobs = st.lists(
    st.one_of(
        st.builds(lambda flops, alone: (flops, alone), st.integers(1, SHORT_FLOPS), st.booleans()),
        st.just((0, False)),
    ),
    max_size=12,
)


@given(jobs, st.integers(1, 4), st.randoms(use_true_random=False))
def test_everything_starts_once_each_kind_in_order(
    kinds: list[tuple[int, bool]], num_ranks: int, random: Random
) -> None:
    """Whatever ends when: long ones one at a time, no rank knows of more short work than it should, nobody starves."""
    queue = [Job((str(index), 1), 1, *kind) for index, kind in enumerate(kinds)]
    one = scheduler(*queue, num_ranks=num_ranks)
    started: list[Job] = []
    running: list[Start] = []
    while one.waiting or running:
        while (start := one.start_next()) is not None:
            started.append(start.job)
            running.append(start)
            assert sum(not each.job.is_short for each in running) <= 1
            for rank in range(num_ranks):
                known = [each.job for each in running if each.job.is_short and each.alone_on in (None, rank)]
                assert len(known) <= 1 or sum(job.interlude_flops for job in known) <= SHORT_FLOPS
        ended = running.pop(random.randrange(len(running)))
        one.over(ended.job.key)
    for is_short in (True, False):
        assert [job for job in started if job.is_short is is_short] == [
            job for job in queue if job.is_short is is_short
        ]
    for long in (job for job in queue if not job.is_short):
        before = queue[: queue.index(long)]
        assert set(before) <= set(started[: started.index(long)]), (
            "nothing that came first is passed by a long one"
        )
