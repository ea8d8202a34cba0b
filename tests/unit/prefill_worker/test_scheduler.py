"""The pure prefill scheduler."""

from sps2_prefill_worker.scheduler import Job, PrefillScheduler

A, B, C = (Job((name, 1), tokens) for name, tokens in (("a", 10), ("b", 20), ("c", 30)))


def test_one_prompt_computes_at_a_time_in_order() -> None:
    scheduler = PrefillScheduler()
    for job in (A, B, C):
        scheduler.submit(job)
    assert scheduler.num_tokens == 60
    assert scheduler.start_next() == A
    assert scheduler.start_next() is None
    scheduler.computed(B.key)  # not the one that computes
    assert scheduler.start_next() is None
    scheduler.computed(A.key)
    assert scheduler.start_next() == B
    assert scheduler.num_tokens == 50


def test_a_waiting_prompt_can_be_withdrawn_a_computing_one_cannot() -> None:
    scheduler = PrefillScheduler()
    for job in (A, B, C):
        scheduler.submit(job)
    assert scheduler.start_next() == A
    assert scheduler.withdraw(B.key)
    assert not scheduler.withdraw(B.key)
    assert not scheduler.withdraw(A.key)
    scheduler.computed(A.key)
    assert scheduler.start_next() == C


def test_clear_forgets_everything() -> None:
    scheduler = PrefillScheduler()
    scheduler.submit(A)
    scheduler.submit(B)
    scheduler.start_next()
    scheduler.clear()
    assert scheduler.num_tokens == 0
    assert scheduler.start_next() is None
