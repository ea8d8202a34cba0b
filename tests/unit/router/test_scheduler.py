"""Who gets a place, in which order, and what is said when there is none."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from sps2.v1 import cluster_pb2
from sps2_router.line import Line
from sps2_router.policies.base import Ask
from sps2_router.policies.least_loaded import LeastLoaded
from sps2_router.scheduler import Scheduler, SchedulerLimits
from sps2_service.errors import Unavailable
from support.fake_workers import FakeView
from support.router_groups import worker

STARTING = cluster_pb2.WORKER_STATE_STARTING


def scheduler(
    *workers: cluster_pb2.WorkerInfo, line: Line | None = None, **limits: float
) -> tuple[Scheduler, FakeView]:
    view = FakeView()
    view.workers = {one.worker_id: one for one in workers}
    return Scheduler(view, LeastLoaded(), "hash", SchedulerLimits(**limits), line or Line()), view  # type: ignore[arg-type]


def refusal(*workers: cluster_pb2.WorkerInfo) -> str:
    with pytest.raises(Unavailable) as caught:
        scheduler(*workers)[0].check_ready()
    assert caught.value.reason == "NO_READY_GROUP"
    assert caught.value.retry_after is not None
    return caught.value.message


async def test_refusals_say_what_is_missing() -> None:
    decode = worker("decode-0/0")
    loading = [worker("prefill-0/0", 2, state=STARTING), worker("prefill-0/1", 2)]
    assert "no ready prefill group: none has registered" in refusal(decode)
    assert "no ready prefill group: 1 of 2 ranks loading" in refusal(decode, *loading)
    assert "no ready decode group: none has registered" in refusal(worker("prefill-0/0"))
    draining = worker("prefill-0/0", state=cluster_pb2.WORKER_STATE_DRAINING)
    assert "prefill-0 is draining" in refusal(decode, draining)
    assert "another hash, other" in refusal(decode, worker("prefill-0/0", model_hash="other"))
    assert "dtype" in refusal(decode, worker("prefill-0/0", dtype="bf16"))


async def test_work_is_spread_and_counted() -> None:
    seats, _ = scheduler(*map(worker, ["prefill-0/0", "prefill-1/0", "decode-0/0", "decode-1/0"]))
    async with seats.seat(Ask(10)) as one, seats.seat(Ask(10)) as two:
        assert {one.pair.prefill.name, two.pair.prefill.name} == {"prefill-0", "prefill-1"}
        assert seats.num_requests_by_group == dict.fromkeys(
            ["prefill-0", "prefill-1", "decode-0", "decode-1"], 1
        )
        seats.leave_prefill(one)
        assert seats.num_requests_by_group[two.pair.prefill.name] == 1
        assert one.pair.prefill.name not in seats.num_requests_by_group
    assert seats.num_requests_by_group == {}


async def test_first_come_first_served() -> None:
    seats, _ = scheduler(worker("prefill-0/0"), worker("decode-0/0"), prefills_per_group=1)
    order: list[int] = []

    async def take(number: int) -> None:
        async with seats.seat(Ask(1)):
            order.append(number)
            await asyncio.sleep(0)

    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        for number in range(10):
            tasks.create_task(take(number))
    assert order == list(range(10))


async def test_a_cancelled_waiter_leaves_the_queue() -> None:
    seats, _ = scheduler(worker("prefill-0/0"), worker("decode-0/0"), prefills_per_group=1)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(seats.seat(Ask(1)))
        head, behind = (asyncio.create_task(enter_and_leave(seats)) for _ in range(2))
        await asyncio.sleep(0.01)
        head.cancel()
        await asyncio.gather(head, return_exceptions=True)
        assert not behind.done()
    await asyncio.wait_for(behind, 1)


async def enter_and_leave(seats: Scheduler, num_tokens: int = 1) -> None:
    async with seats.seat(seats.sized(Ask(num_tokens))):
        pass


async def test_groups_to_avoid_are_used_only_without_another() -> None:
    seats, view = scheduler(*map(worker, ["prefill-0/0", "prefill-1/0", "decode-0/0"]))
    avoid = frozenset({"prefill-0", "decode-0"})
    async with seats.seat(Ask(1), avoid) as seat:
        assert (seat.pair.prefill.name, seat.pair.decode.name) == ("prefill-1", "decode-0")
    del view.workers["prefill-1/0"]
    async with seats.seat(Ask(1), avoid) as seat:
        assert seat.pair.prefill.name == "prefill-0"


async def test_only_the_patient_wait_for_a_group() -> None:
    seats, view = scheduler(worker("decode-0/0"), regroup_wait_s=5)
    with pytest.raises(Unavailable):
        await enter_and_leave(seats)

    async def patient() -> str:
        async with seats.seat(Ask(1), patient=True) as seat:
            return seat.pair.prefill.name

    waiting = asyncio.create_task(patient())
    await asyncio.sleep(0.01)
    view.workers["prefill-0/0"] = worker("prefill-0/0")
    seats.wake()
    assert await asyncio.wait_for(waiting, 1) == "prefill-0"


async def test_patience_ends() -> None:
    seats, _ = scheduler(worker("decode-0/0"), regroup_wait_s=0.05)
    with pytest.raises(Unavailable):
        async with seats.seat(Ask(1), patient=True):
            pass


async def test_the_last_view_is_trusted_for_a_while() -> None:
    seats, view = scheduler(worker("prefill-0/0"), worker("decode-0/0"), directory_away_s=0.05)
    seats.wake()
    view.connected = False
    seats.wake()
    seats.check_ready()
    await asyncio.sleep(0.06)
    with pytest.raises(Unavailable) as caught:
        seats.check_ready()
    assert caught.value.reason == "DIRECTORY_AWAY"
    view.connected = True
    seats.check_ready()


async def test_turns_not_arrival_say_who_is_next() -> None:
    """Also before one that has come to the front and waits there."""
    seats, _ = scheduler(worker("prefill-0/0"), worker("decode-0/0"), prefills_per_group=1)
    order: list[int] = []

    async def take(turn: int) -> None:
        async with seats.seat(Ask(1), turn=turn):
            order.append(turn)

    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks, seats.seat(Ask(1)):
        for turn in (7, 9, 8, 3, 5):
            tasks.create_task(take(turn))
            await asyncio.sleep(0)
    assert order == [3, 5, 7, 8, 9]


async def test_tenants_share_and_who_had_a_seat_goes_first() -> None:
    line = Line({"big": 2.0, "small": 1.0}.__getitem__)
    seats, _ = scheduler(worker("prefill-0/0"), worker("decode-0/0"), line=line, prefills_per_group=1)
    order: list[str] = []

    async def take(tenant: str, turn: int, *, had_seat: bool = False) -> None:
        async with seats.seat(Ask(100, 10, tenant), turn=turn, had_seat=had_seat):
            order.append(tenant[0].upper() if had_seat else tenant[0])

    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks, seats.seat(Ask(1, tenant="small")):
        for number in range(6):
            tasks.create_task(take("small", number))
            tasks.create_task(take("big", 10 + number))
        tasks.create_task(take("small", -1, had_seat=True))
        await asyncio.sleep(0)
        assert line.num_tokens == {False: 12 * 100}
    assert "".join(order) == "Sbsbbsbbsbsss"


async def test_the_wait_for_a_place_ends() -> None:
    seats, _ = scheduler(worker("prefill-0/0"), worker("decode-0/0"), prefills_per_group=1)
    async with seats.seat(Ask(1)):
        for place in ("first", "second"):
            with pytest.raises(Unavailable, match=r"0\.01 s") as caught:
                async with seats.seat(Ask(1), wait_s=0.01):
                    raise AssertionError(f"{place} had none")
            assert (caught.value.reason, caught.value.retry_after) == ("QUEUE_WAIT", 1.0)
    await asyncio.wait_for(enter_and_leave(seats), 1)


async def test_idle_groups_take_turns_and_a_new_one_is_next() -> None:
    seats, view = scheduler(*map(worker, ["prefill-0/0", "prefill-1/0", "decode-0/0", "decode-1/0"]))

    async def used() -> tuple[str, str]:
        async with seats.seat(Ask(1)) as seat:
            return seat.pair.prefill.name, seat.pair.decode.name

    assert [await used() for _ in range(3)] == [
        ("prefill-0", "decode-0"),
        ("prefill-1", "decode-1"),
        ("prefill-0", "decode-0"),
    ]
    view.workers["decode-2/0"] = worker("decode-2/0")
    assert await used() == ("prefill-1", "decode-2")


async def test_short_prompts_do_not_wait_behind_long_ones() -> None:
    """They have places of their own where a prefill group computes them beside long ones."""
    prefill = worker("prefill-0/0", load=cluster_pb2.WorkerLoad(short_prompt_tokens=10))
    seats, _ = scheduler(prefill, worker("decode-0/0"), prefills_per_group=1, short_prefills_per_group=2)
    async with seats.seat(seats.sized(Ask(11))) as long, AsyncExitStack() as short, asyncio.timeout(5):
        behind = asyncio.create_task(enter_and_leave(seats, 11))
        await asyncio.sleep(0)
        for _ in range(2):
            seat = await short.enter_async_context(seats.seat(seats.sized(Ask(10))))
        third = asyncio.create_task(enter_and_leave(seats, 10))
        await asyncio.sleep(0)
        seats.leave_prefill(seat)
        await third
        assert not behind.done()
        seats.leave_prefill(long)
        await behind
