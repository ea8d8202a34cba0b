"""CallScope: typed ends, the two timers, and cancellations that are not its own."""

import asyncio

import pytest

from sps2_router.scope import CallScope
from sps2_service.errors import Cancelled, DeadlineExceeded, ServiceError

ERROR = Cancelled("CANCELLED", "by the test")


async def ended_by(total_s: float, *errors: ServiceError) -> None:
    with CallScope(total_s=total_s, silence_s=5) as scope:
        for error in errors:
            asyncio.get_running_loop().call_soon(scope.end, error)
        await asyncio.sleep(5)


async def test_end_raises_its_error() -> None:
    with pytest.raises(Cancelled):
        await ended_by(5, ERROR)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(0)  # no cancellation is left over


async def test_the_first_error_counts() -> None:
    with pytest.raises(Cancelled):
        await ended_by(0.001, ERROR, DeadlineExceeded("LATE", "x"))


async def test_cleanup_runs_before_the_error_comes_out() -> None:
    steps = []
    try:
        with CallScope(total_s=0.01, silence_s=5):
            try:
                await asyncio.sleep(5)
            finally:
                await asyncio.sleep(0.01)
                steps.append("cleaned up")
    except DeadlineExceeded:
        steps.append("raised")
    assert steps == ["cleaned up", "raised"]


async def test_silence_ends_and_touch_prevents_it() -> None:
    with CallScope(total_s=5, silence_s=0.1) as scope:
        for _ in range(5):
            await asyncio.sleep(0.05)
            scope.touch()
    with pytest.raises(DeadlineExceeded, match="SILENT"), CallScope(total_s=5, silence_s=0.05):
        await asyncio.sleep(5)


async def test_a_cancellation_from_outside_passes_through() -> None:
    async def work() -> None:
        with CallScope(total_s=5, silence_s=5) as scope:
            asyncio.get_running_loop().call_soon(scope.end, ERROR)
            await asyncio.sleep(5)

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_other_errors_pass_through_and_an_ended_scope_is_inert() -> None:
    with pytest.raises(ValueError, match="mine"), CallScope(total_s=5, silence_s=5) as scope:
        raise ValueError("mine")
    scope.end(ERROR)
    await asyncio.sleep(0)


async def wait_then_be_silent(silence_s: float) -> None:
    with CallScope(total_s=5, silence_s=0.05) as scope:
        with scope.waiting():
            await asyncio.sleep(0.2)
        await asyncio.sleep(silence_s)


async def test_waiting_is_no_silence() -> None:
    await wait_then_be_silent(0.01)
    with pytest.raises(DeadlineExceeded, match="nothing happened"):
        await wait_then_be_silent(2)
