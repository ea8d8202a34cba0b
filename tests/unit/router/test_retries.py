"""Which failure is followed by another attempt, when, and on which groups."""

import pytest

from sps2_router.handshake import Phase
from sps2_router.retries import Retries, RetryLimits
from sps2_router.retry_budget import RESERVE, RETRIES_PER_S, RetryBudget
from sps2_service.errors import Aborted, DataLoss, FailedPrecondition, Internal, ServiceError, Unavailable
from support.router_groups import pair

PAIR = pair("prefill-0", "decode-0")
DIED = Unavailable("RANK_DIED", "decode-0/1 died", metadata={"component": "decode-0/1"})
NO_KV = Unavailable("NO_KV", "no room", retry_after=0.5)


def test_failures_are_counted_and_the_last_one_is_told() -> None:
    retries = Retries(RetryLimits(max_attempts=3), RetryBudget())
    pauses = [retries.after(DIED, Phase.PREFILLING, PAIR, now) for now in (0, 1)]
    assert 0 < pauses[0] < pauses[1]
    with pytest.raises(Unavailable) as caught:
        retries.after(DIED, Phase.TRANSFERRING, PAIR, 2)
    assert (caught.value.reason, caught.value.metadata) == ("RANK_DIED", DIED.metadata)
    assert caught.value.retry_after


def test_what_began_it_is_named_when_its_echoes_end_it() -> None:
    retries = Retries(RetryLimits(max_attempts=2), RetryBudget())
    retries.after(DIED, Phase.PREFILLING, PAIR, 0)
    echo = Unavailable("GROUP_NOT_READY", "rank 1 loading", retry_after=0.5)
    with pytest.raises(Unavailable) as caught:
        retries.after(echo, Phase.PREFILLING, PAIR, 0)
    for error in (caught.value, retries.no_group(Unavailable("NO_READY_GROUP", "none"))):
        assert error.metadata == DIED.metadata
        assert DIED.message in error.message
    fresh = Unavailable("NO_READY_GROUP", "none")
    assert Retries(RetryLimits(), RetryBudget()).no_group(fresh) is fresh


def test_the_group_that_failed_is_avoided() -> None:
    retries = Retries(RetryLimits(), RetryBudget())
    assert not retries.avoid
    retries.after(DIED, Phase.PREFILLING, PAIR, 0)
    assert retries.avoid == {"decode-0"}
    retries.after(Aborted("STALE", "nobody named"), Phase.PREFILLING, PAIR, 0)
    assert retries.avoid == {"decode-0", "prefill-0"}


def test_aborted_attempts_end_as_unavailable_for_the_client() -> None:
    with pytest.raises(Unavailable):
        Retries(RetryLimits(max_attempts=1), RetryBudget()).after(
            Aborted("STALE", "x"), Phase.PREFILLING, PAIR, 0
        )


@pytest.mark.parametrize("kind", [Internal, FailedPrecondition, DataLoss])
def test_other_errors_are_final(kind: type[ServiceError]) -> None:
    error = kind("X", "x")
    with pytest.raises(kind) as caught:
        Retries(RetryLimits(), RetryBudget()).after(error, Phase.PREFILLING, PAIR, 0)
    assert caught.value is error


def test_waiting_for_room_is_no_failure_but_ends() -> None:
    retries = Retries(RetryLimits(admission_wait_s=10), RetryBudget())
    for now in range(9):
        assert retries.after(NO_KV, Phase.RESERVING, PAIR, now) == 0.5
    assert retries.num_failures == 0
    assert retries.avoid == {"decode-0"}
    with pytest.raises(Unavailable) as caught:
        retries.after(NO_KV, Phase.RESERVING, PAIR, 9.6)
    assert (caught.value.reason, caught.value.retry_after) == ("NO_KV", 0.5)
    assert "waited 9.6 s" in caught.value.message


def test_not_now_after_the_reservation_is_a_failure() -> None:
    retries = Retries(RetryLimits(), RetryBudget())
    retries.after(NO_KV, Phase.PREFILLING, PAIR, 0)
    assert retries.num_failures == 1


def test_pauses_are_bounded_whatever_a_worker_says() -> None:
    for told in (0.0, 1000.0):
        error = Unavailable("NO_KV", "no room", retry_after=told)
        assert 0 < Retries(RetryLimits(), RetryBudget()).after(error, Phase.RESERVING, PAIR, 0) <= 1


DRAINS = Unavailable("GROUP_DRAINING", "leaving", retry_after=1.0, metadata={"component": "prefill-0"})


def test_a_group_that_drains_is_no_failure_and_is_left_alone() -> None:
    retries = Retries(RetryLimits(max_attempts=1, admission_wait_s=0), RetryBudget())
    quick = retries.after(DRAINS, Phase.PREFILLING, PAIR, 0)
    assert retries.avoid == {"prefill-0"}
    handed_back = Unavailable("GROUP_DRAINING", "leaving", metadata={"component": "decode-0"})
    assert retries.after(handed_back, Phase.COMMITTED, PAIR, 1) == quick
    assert retries.avoid == {"prefill-0", "decode-0"}
    # There is no other group: it is not asked again and again.
    assert retries.after(handed_back, Phase.RESERVING, PAIR, 2) > 10 * quick
    assert retries.num_failures == 0


def test_without_budget_what_has_begun_is_slowed_and_the_rest_is_told_to_come_back() -> None:
    budget = RetryBudget()
    for _ in range(int(RESERVE)):
        assert Retries(RetryLimits(), budget).after(DIED, Phase.PREFILLING, PAIR, 0) < 1 / RETRIES_PER_S
    with pytest.raises(Unavailable) as caught:
        Retries(RetryLimits(), budget).after(DIED, Phase.PREFILLING, PAIR, 0)
    assert caught.value.retry_after
    assert DIED.message in caught.value.message
    begun = [Retries(RetryLimits(), budget) for _ in range(3)]
    pauses = [retries.after(DIED, Phase.COMMITTED, PAIR, 0) for retries in begun]
    assert pauses == pytest.approx([1 / RETRIES_PER_S, 2 / RETRIES_PER_S, 3 / RETRIES_PER_S])
    assert begun[0].after(DIED, Phase.PREFILLING, PAIR, 0) > 0, "it has begun, though this attempt has not"


def test_the_budget_comes_back_with_time_and_with_requests() -> None:
    budget = RetryBudget()
    for _ in range(int(RESERVE)):
        budget.take(0)
    assert not budget.can_take(0)
    assert budget.can_take(1 / RETRIES_PER_S)
    budget.take(1 / RETRIES_PER_S)
    for _ in range(11):
        budget.request()
    assert budget.can_take(1 / RETRIES_PER_S)
