"""How the leader of a group lets it go: refuse, finish, hand back. Knows neither calls nor the directory.

    TAKING --drain--> FINISHING --idle, or the budget is over--> LINGERING --all routers know--> DONE

What is not finished within the budget is handed back: each call ends with GROUP_DRAINING, and the router has the
request go on elsewhere, as after a preemption.
"""

import asyncio
import enum
from typing import Protocol

import structlog

PROPAGATION_S = 0.5
"""How long a leader that has nothing left to do stays to refuse: routers follow the directory within a fraction of it.
Without it their last attempts would meet a closed port, which is a failure."""

log = structlog.get_logger(__name__)


class DrainPhase(enum.Enum):
    """Where a group is on its way out."""

    TAKING = "taking"
    """It does not drain."""
    FINISHING = "finishing"
    """It takes nothing more, and finishes what it has."""
    LINGERING = "lingering"
    """It holds nothing more; routers may not know yet that it is going."""
    DONE = "done"
    """It may leave."""


class DrainableWork(Protocol):
    """What a leader's coordinator does for it. Called on the event loop."""

    async def drain(self) -> None:
        """From its call on takes no more attempts; returns when the last one has ended."""
        ...

    def hand_back(self) -> int:
        """Ends every attempt with `failures.group_draining`, at once; how many there were. Must not block."""
        ...


class GroupDrain:
    """One drain of one group."""

    def __init__(self, work: DrainableWork, budget_s: float, propagation_s: float = PROPAGATION_S) -> None:
        """`budget_s`: seconds for what runs to finish by itself."""
        self._work = work
        self._budget_s = budget_s
        self._propagation_s = propagation_s
        self.phase = DrainPhase.TAKING
        self.num_handed_back = 0
        """Attempts that did not finish within the budget."""

    async def run(self) -> None:
        """Returns when the group may leave; once. Cancelled, it hands back what is left at once."""
        loop = asyncio.get_running_loop()
        told_at = loop.time()
        self.phase = DrainPhase.FINISHING
        try:
            async with asyncio.timeout(self._budget_s):
                await self._work.drain()
        except TimeoutError:
            self._hand_back("the drain budget is over")
        except asyncio.CancelledError:
            self._hand_back("the drain was cut short")
            raise
        self.phase = DrainPhase.LINGERING
        await asyncio.sleep(max(0.0, told_at + self._propagation_s - loop.time()))
        self.phase = DrainPhase.DONE

    def _hand_back(self, why: str) -> None:
        self.num_handed_back = self._work.hand_back()
        log.warning("attempts handed back", why=why, count=self.num_handed_back, budget_s=self._budget_s)
