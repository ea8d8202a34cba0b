"""The queue's bounds hold whatever comes and goes, and nothing is left behind."""

import asyncio
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given
from hypothesis import strategies as st

from sps2_router.come_again import MAX_RETRY_S, MIN_RETRY_S
from sps2_router.line import Line
from sps2_router.policies.base import Ask
from sps2_router.prompt_queue import PromptQueue, Queued, QueueLimits
from sps2_router.tenants import Tenants
from sps2_service.errors import ResourceExhausted, Unavailable

LIMIT, OWN_LIMIT, LONGEST = 100, 60, 150
TENANTS = "a weight=2\nbound max-queued-tokens=60 tokens-per-minute=500\n"
steps = st.lists(
    st.tuples(
        st.sampled_from(["come", "come", "begin", "place", "end"]),
        st.sampled_from(["a", "b", "c", "d", "e", "f", "bound"]),
        st.integers(1, LONGEST),
        st.integers(0, 5),
    ),
    max_size=50,
)


@given(steps)
def test_bounds_hold_and_nothing_is_left(script: list[tuple[str, str, int, int]]) -> None:
    with TemporaryDirectory() as folder:
        (Path(folder) / "tenants").write_text(TENANTS)
        asyncio.run(_replay(script, Tenants(Path(folder) / "tenants")))


async def _replay(script: list[tuple[str, str, int, int]], tenants: Tenants) -> None:
    line, clock = Line(tenants.weight), [0.0]
    queue = PromptQueue(QueueLimits(LIMIT, 1000.0), tenants, line, lambda: 0.5)
    queue._now = lambda: clock[0]
    live: list[tuple[ExitStack, Queued]] = []
    waiting: dict[Queued, int] = {}
    told: list[float] = []
    for kind, tenant, size, seconds in script:
        clock[0] += seconds
        if kind == "come":
            stack, ask = ExitStack(), Ask(size, size, tenant)
            try:
                queued = stack.enter_context(queue.hold(ask, 0, 1000.0))
            except (Unavailable, ResourceExhausted) as error:
                told.append(error.retry_after or 0.0)
            else:
                live.append((stack, queued))
                waiting[queued] = size
        elif live:
            at = size % len(live)
            stack, queued = live[at]
            if kind == "begin":
                queued.leave()
                waiting.pop(queued, None)
            elif kind == "place" and not queued.is_placed:
                stack.enter_context(queued.placed())
            elif kind == "end":
                stack.close()
                waiting.pop(queued, None)
                del live[at]
        assert queue.num_tokens == sum(waiting.values())
        assert queue.num_tokens <= max(2 * LIMIT, LONGEST)
        bound = [size for queued, size in waiting.items() if queued.ask.tenant == "bound"]
        assert sum(bound) <= OWN_LIMIT or len(bound) == 1
    assert all(MIN_RETRY_S <= one <= 1.25 * MAX_RETRY_S for one in told)
    for stack, _ in live:
        stack.close()
    assert queue.num_tokens == 0
