"""Admission: ids, nonces, bounds, draining."""

import asyncio
from pathlib import Path

import pytest

from sps2_router.admission import Admission
from sps2_router.scope import CallScope
from sps2_router.tenants import Tenants
from sps2_service.errors import (
    Aborted,
    AlreadyExists,
    Cancelled,
    ResourceExhausted,
    ServiceError,
    Unavailable,
)


def admitting(max_live_requests: int = 10) -> Admission:
    return Admission(max_live_requests, Tenants(None))


def scope() -> CallScope:
    return CallScope(total_s=10, silence_s=10)


def cancel(admission: Admission, request_id: str) -> None:
    live = admission.find(request_id)
    assert live is not None
    live.scope.end(Cancelled("CANCELLED", "by the test"))


async def hold(
    admission: Admission, request_id: str, nonce: bytes, attempts: list[int], retry: int = 0
) -> None:
    """A request that lives until it is ended."""
    with scope() as own, admission.register(request_id, nonce, own, retry=retry) as live:
        attempts.append(live.next_attempt())
        await asyncio.Event().wait()


async def start(admission: Admission, request_id: str = "r", nonce: bytes = b"") -> asyncio.Task[None]:
    task = asyncio.create_task(hold(admission, request_id, nonce, []))
    await asyncio.sleep(0)
    return task


async def ended(task: asyncio.Task[None]) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        await asyncio.wait_for(task, 1)
    return caught.value


async def test_an_id_is_free_again_after_its_request() -> None:
    admission = admitting()
    for _ in range(2):
        with scope() as own, admission.register("r", b"", own):
            assert admission.num_live == 1
        assert admission.num_live == 0


@pytest.mark.parametrize(("first", "second"), [(b"", b""), (b"1", b""), (b"", b"1"), (b"1", b"2")])
async def test_a_live_id_is_refused_without_the_same_nonce(first: bytes, second: bytes) -> None:
    admission = admitting()
    task = await start(admission, nonce=first)
    with pytest.raises(AlreadyExists), scope() as own, admission.register("r", second, own):
        pass
    assert not task.done()
    cancel(admission, "r")
    assert isinstance(await ended(task), Cancelled)


async def test_a_retry_supersedes_and_counts_on() -> None:
    admission = admitting()
    attempts: list[int] = []
    tasks = []
    for _ in range(3):
        tasks.append(asyncio.create_task(hold(admission, "r", b"1", attempts)))
        await asyncio.sleep(0)
    assert [isinstance(await ended(task), Aborted) for task in tasks[:2]] == [True, True]
    assert attempts == [1, 2, 3]
    assert admission.num_live == 1
    cancel(admission, "r")
    await ended(tasks[2])
    assert admission.num_live == 0


async def test_a_call_that_arrives_after_its_retry_takes_no_place() -> None:
    """Its connection was lost, and the client has sent the next one: two connections have no order."""
    admission = admitting()
    retry = asyncio.create_task(hold(admission, "r", b"1", [], retry=1))
    await asyncio.sleep(0)
    with pytest.raises(Aborted) as caught, scope() as own, admission.register("r", b"1", own, retry=0):
        pass
    assert caught.value.reason == "SUPERSEDED"
    assert not retry.done()
    cancel(admission, "r")
    assert isinstance(await ended(retry), Cancelled)


async def test_an_unknown_id_is_not_found() -> None:
    assert admitting().find("r") is None


async def test_live_requests_are_bounded() -> None:
    admission = admitting(max_live_requests=1)
    task = await start(admission, "a", b"1")
    with pytest.raises(Unavailable) as caught, scope() as own, admission.register("b", b"", own):
        pass
    assert caught.value.retry_after == pytest.approx(1.25, abs=0.25)  # nothing was measured yet
    # A retry takes no second place.
    retry = await start(admission, "a", b"1")
    await ended(task)
    cancel(admission, "a")
    await ended(retry)


async def test_who_finds_no_place_is_told_when_one_will_be_free() -> None:
    """Two places, one of which becomes free every 2 s: the third to be sent away finds one after 6."""
    clock = [0.0]
    admission = Admission(2, Tenants(None), now=lambda: clock[0], draw=lambda: 0.0)

    def told() -> float | None:
        with pytest.raises(Unavailable) as caught, scope() as own, admission.register("late", b"", own):
            pass
        assert caught.value.reason == "TOO_MANY_REQUESTS"
        return caught.value.retry_after

    live = [await start(admission, "0"), await start(admission, "1")]
    for index in range(2, 7):
        clock[0] += 2.0
        cancel(admission, str(index - 2))
        await ended(live.pop(0))
        live.append(await start(admission, str(index)))
    assert [told(), told(), told()] == [2.0, 4.0, 6.0]
    clock[0] += 4.0
    assert told() == pytest.approx(4.0, abs=1.0)  # 2 are left of what was said, and the next place after that
    for _ in range(100):
        assert (told() or 0.0) <= 60.0
    cancel(admission, "5")
    await ended(live.pop(0))
    with scope() as own, admission.register("in time", b"", own):
        pass
    cancel(admission, "6")
    await ended(live.pop(0))


async def test_live_requests_of_a_tenant_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "tenants").write_text("acme max-live-requests=1\n")
    admission = Admission(10, Tenants(tmp_path / "tenants"))
    with scope() as own, admission.register("a", b"1", own, "acme"):
        with (
            pytest.raises(ResourceExhausted) as caught,
            scope() as two,
            admission.register("b", b"", two, "acme"),
        ):
            pass
        assert [one.subject for one in caught.value.quota] == ["tenant:acme"]
        assert caught.value.retry_after is not None
        with scope() as three, admission.register("c", b"", three, "other"):
            pass
    with scope() as own, admission.register("b", b"", own, "acme"):
        pass


async def test_draining_takes_nothing_and_waits_for_the_rest() -> None:
    admission = admitting()
    task = await start(admission)
    admission.drain()
    with pytest.raises(Unavailable) as caught, scope() as own, admission.register("b", b"", own):
        pass
    assert caught.value.reason == "DRAINING"
    waiting = asyncio.create_task(admission.wait_empty())
    await asyncio.sleep(0)
    assert not waiting.done()
    cancel(admission, "r")
    await ended(task)
    await asyncio.wait_for(waiting, 1)
