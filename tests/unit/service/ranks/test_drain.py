"""A group's way out: it refuses, finishes what it can in time, hands back the rest, and stays until routers know."""

import asyncio

import pytest

from sps2_service.ranks.drain import DrainPhase, GroupDrain

PROPAGATION_S = 0.05


class Work:
    """Attempts that end when the test says so."""

    def __init__(self) -> None:
        self.takes = True
        self.num_live = 2
        self.idle = asyncio.Event()

    async def drain(self) -> None:
        self.takes = False
        await self.idle.wait()

    def hand_back(self) -> int:
        count, self.num_live = self.num_live, 0
        return count


async def until(drain: GroupDrain, phase: DrainPhase) -> None:
    async with asyncio.timeout(5):
        while drain.phase is not phase:  # noqa: ASYNC110 - a phase is no event
            await asyncio.sleep(0)


async def test_what_finishes_in_time_is_not_handed_back() -> None:
    work = Work()
    drain = GroupDrain(work, budget_s=5, propagation_s=PROPAGATION_S)
    assert drain.phase is DrainPhase.TAKING
    running = asyncio.create_task(drain.run())
    await until(drain, DrainPhase.FINISHING)
    await asyncio.sleep(0)
    assert not work.takes
    work.idle.set()
    await until(drain, DrainPhase.LINGERING)
    await running
    assert (drain.phase, drain.num_handed_back, work.num_live) == (DrainPhase.DONE, 0, 2)


@pytest.mark.parametrize("budget_s", [0.0, 0.02])
async def test_what_does_not_is(budget_s: float) -> None:
    work = Work()
    drain = GroupDrain(work, budget_s=budget_s, propagation_s=PROPAGATION_S)
    began = asyncio.get_running_loop().time()
    async with asyncio.timeout(5):
        await drain.run()
    assert (drain.phase, drain.num_handed_back, work.num_live) == (DrainPhase.DONE, 2, 0)
    assert not work.takes
    # An idle group stays as long: routers that do not know yet find somebody who refuses.
    assert asyncio.get_running_loop().time() - began >= PROPAGATION_S


async def test_cut_short_it_hands_back_at_once() -> None:
    work = Work()
    drain = GroupDrain(work, budget_s=60, propagation_s=60)
    running = asyncio.create_task(drain.run())
    await until(drain, DrainPhase.FINISHING)
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert (drain.num_handed_back, work.num_live) == (2, 0)
