"""The queue before prefill: its bounds, the tenants' quotas, and what those hear who are sent away."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from sps2_router.come_again import MAX_RETRY_S, MIN_RETRY_S, UNKNOWN_RETRY_S
from sps2_router.drain_rate import FORGET_S, MIN_DEPARTURES, WINDOW, DrainRate
from sps2_router.line import Line
from sps2_router.policies.base import Ask
from sps2_router.prompt_queue import (
    PromptQueue,
    Queued,
    QueueLimits,
)
from sps2_router.tenants import NO_LIMITS, TenantLimits, Tenants, parse_tenants
from sps2_router.token_bucket import TokenBucket
from sps2_service.errors import ResourceExhausted, ServiceError, Unavailable
from sps2_service.followed_file import LinesError

LONG_S = 3600.0


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Fixture:
    """A queue with a clock of its own, and a line of which nobody is called."""

    def __init__(self, tenants: Tenants | None = None, **limits: int) -> None:
        self.line = Line()
        self.clock = Clock()
        self.queue = PromptQueue(
            QueueLimits(**limits),
            tenants or Tenants(None),
            self.line,
            lambda: 0.0,
        )
        self.queue._now = self.clock

    @contextmanager
    def queued(
        self, num_tokens: int, tenant: str = "", max_new_tokens: int = 0, *, is_short: bool = False
    ) -> Iterator[Queued]:
        """One that stands in line, too."""
        ask = Ask(num_tokens, max_new_tokens, tenant, is_short=is_short)
        with self.queue.hold(ask, 0, LONG_S) as queued, self.line.place(ask, 0):
            yield queued

    def refusal(self, num_tokens: int, tenant: str = "", time_left: float = LONG_S) -> ServiceError:
        with pytest.raises(ServiceError) as caught:
            self.queue.check(Ask(num_tokens, tenant=tenant), 0, time_left)
        assert caught.value.retry_after is not None
        return caught.value

    def drain(self, tokens_per_s: int, *, is_short: bool = False) -> None:
        """Lets so many leave that the rate is known."""
        with self.queued(1, is_short=is_short):
            for _ in range(WINDOW):
                with self.queued(tokens_per_s, is_short=is_short) as queued:
                    self.clock.now += 1
                    queued.leave()


async def test_the_queue_is_bounded_in_tokens() -> None:
    up = Fixture(max_tokens=100)
    with up.queued(60), up.queued(40):
        error = up.refusal(1)
        assert (type(error), error.reason) == (Unavailable, "QUEUE_FULL")
        assert error.retry_after == UNKNOWN_RETRY_S
    assert up.queue.num_tokens == 0
    with up.queued(5000) as queued:  # one request alone always fits
        assert up.queue.num_tokens == 5000
        queued.leave()
        queued.leave()
        assert up.queue.num_tokens == 0


async def test_one_tenant_cannot_fill_the_queue_for_others(tmp_path: Path) -> None:
    (tmp_path / "tenants").write_text("light weight=3\n")
    up = Fixture(Tenants(tmp_path / "tenants"), max_tokens=100)
    with up.queued(60, "heavy"), up.queued(40, "heavy"):
        assert up.refusal(1, "heavy").reason == "QUEUE_FULL"
        with up.queued(50, "light"):
            up.queue.check(Ask(25, tenant="light"), 0, LONG_S)
            assert up.refusal(26, "light").reason == "QUEUE_FULL"
            assert up.refusal(21, "other").reason == "QUEUE_FULL"
            up.queue.check(Ask(20, tenant="other"), 0, LONG_S)


async def test_a_full_queue_says_when_it_will_have_room() -> None:
    up = Fixture(max_tokens=1000)
    up.drain(tokens_per_s=100)
    with up.queued(20):
        assert up.refusal(990).retry_after == MIN_RETRY_S
        with up.queued(880):
            assert up.refusal(101).retry_after == pytest.approx(9.0, rel=0.05)
            up.clock.now += 10_000  # nothing leaves it any more
            assert up.refusal(101).retry_after == MAX_RETRY_S


async def test_who_would_wait_too_long_is_told_at_once() -> None:
    up = Fixture(max_wait_s=20)
    up.drain(tokens_per_s=100)
    with up.queued(500), up.queued(400) as placed:
        placed.is_placed = True  # what a group has but has not begun with is before it, too
        up.queue.check(Ask(10), 1, LONG_S)
        with up.queued(300):
            error = up.refusal(10)
            assert (type(error), error.reason) == (Unavailable, "QUEUE_WAIT")
            assert error.retry_after == pytest.approx(12.0, rel=0.1)
        # Its own deadline counts as well.
        assert up.refusal(10, time_left=15).retry_after == pytest.approx(9.0, rel=0.1)


async def test_the_wait_is_that_of_its_tenant() -> None:
    up = Fixture(max_wait_s=20)
    up.drain(tokens_per_s=100)
    with ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(up.queued(110, "heavy"))
        assert up.refusal(100, "heavy").reason == "QUEUE_WAIT"
        up.queue.check(Ask(100, tenant="light"), 1, LONG_S)


async def test_short_prompts_wait_for_their_own_kind() -> None:
    up = Fixture(max_wait_s=20)
    up.drain(tokens_per_s=100)
    up.drain(tokens_per_s=10, is_short=True)
    with up.queued(500), up.queued(600):
        assert up.refusal(10).reason == "QUEUE_WAIT"
        with up.queued(90, is_short=True):
            up.queue.check(Ask(10, is_short=True), 1, LONG_S)
            with up.queued(20, is_short=True), pytest.raises(Unavailable) as caught:
                up.queue.check(Ask(10, is_short=True), 1, LONG_S)
            assert caught.value.retry_after == pytest.approx(11.0, rel=0.1)


async def test_quotas_are_a_tenants_own(tmp_path: Path) -> None:
    (tmp_path / "tenants").write_text("acme max-queued-tokens=100\nother tokens-per-minute=600\n* weight=2\n")
    up = Fixture(Tenants(tmp_path / "tenants"))
    with up.queued(90, "acme"):
        error = up.refusal(20, "acme")
        assert (type(error), error.reason) == (ResourceExhausted, "TENANT_QUEUE_FULL")
        assert [one.subject for one in error.quota] == ["tenant:acme"]
        up.queue.check(Ask(10**5, tenant="else"), 0, LONG_S)
    with up.queued(400, "other", max_new_tokens=100) as queued:
        queued.leave()
        error = up.refusal(200, "other")
        assert error.reason == "TOKENS_PER_MINUTE"
        assert error.retry_after == pytest.approx(10.0)
    # Its answer came to nothing: what it did not use it has again; and all of one that never began.
    up.queue.check(Ask(200, tenant="other"), 0, LONG_S)
    with up.queued(200, "other"):
        assert up.refusal(200, "other").retry_after == pytest.approx(20.0)
    up.queue.check(Ask(200, tenant="other"), 0, LONG_S)


def test_a_bucket_fills_and_lets_none_wait_forever() -> None:
    bucket = TokenBucket()
    assert bucket.wait_s(60, 60, 0) == 0
    bucket.take(60)
    assert bucket.wait_s(30, 60, 0) == 30
    assert bucket.wait_s(30, 60, 30) == 0
    assert bucket.wait_s(1000, 60, 60) == 0  # more than it holds: when it is full
    bucket.take(1000)
    assert bucket.wait_s(1, 60, 60) == 941


def test_the_rate_is_known_after_a_few_and_only_while_somebody_waits() -> None:
    drain = DrainRate()
    drain.left(10**6, 0)  # nobody waited
    drain.waiting(True, 0)
    for second in range(MIN_DEPARTURES):
        assert drain.rate(second) is None
        drain.left(50, second)
    last = MIN_DEPARTURES - 1
    assert drain.rate(last) == pytest.approx(50)
    drain.waiting(False, last)
    assert drain.rate(last + 30) == pytest.approx(50)  # time without anybody does not count
    drain.waiting(True, last + 30)
    assert drain.rate(last + 31) == pytest.approx(50)
    assert drain.rate(last + 60) == pytest.approx(200 / 33)  # it stands still
    drain.waiting(False, last + 60)
    drain.waiting(True, last + 61 + FORGET_S)
    assert drain.rate(last + 62 + FORGET_S) is None


def test_one_long_prompt_does_not_spoil_the_rate() -> None:
    """100 tokens take a second; while the long one is computed nothing leaves for 30 s."""
    drain, now = DrainRate(), 0.0
    drain.waiting(True, now)
    for num_tokens in (100, 100, 100, 100, 3000):
        drain.left(num_tokens, now)
        now += num_tokens / 100
    for part in (0.1, 0.5, 0.99):
        assert drain.rate(now - 30 * (1 - part)) == pytest.approx(100)


def test_the_tenants_file() -> None:
    limits = parse_tenants(
        "# who\nacme weight=2.5 max-live-requests=3 # ours\n\n* tokens-per-minute=7\nfree\n"
    )
    assert limits == {
        "acme": TenantLimits(weight=2.5, max_live_requests=3),
        "*": TenantLimits(tokens_per_minute=7),
        "free": NO_LIMITS,
    }


@pytest.mark.parametrize(
    "line",
    [
        "a weight=0",
        "a weight=nan",
        "a weight",
        "a speed=3",
        "a weight=1 weight=1",
        "a max-queued-tokens=-1",
        "b",
    ],
)
def test_a_wrong_line_of_it_is_named(line: str) -> None:
    with pytest.raises(LinesError, match=r"line 2|tenant 'b'"):
        parse_tenants("b\n" + line)


def test_a_tenant_without_a_line_is_like_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "tenants"
    file.write_text("acme\n* weight=3\n")
    tenants = Tenants(file)
    assert [tenants.weight(one) for one in ("acme", "other", "")] == [1.0, 3.0, 3.0]
    file.write_text("nonsense=1=\n* weight=0\n")
    assert tenants.weight("other") == 3.0  # what is wrong changes nothing
    file.write_text("* weight=50\n")
    assert tenants.weight("other") == 50.0
    file.unlink()
    assert tenants.weight("other") == 50.0
