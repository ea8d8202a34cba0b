"""Word that something in the cluster is not as it was: who waits for it looks again at all that concerns him."""

import asyncio
from collections.abc import Callable


class Changes:
    """Used on one event loop."""

    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[None]] = set()

    def tell(self) -> None:
        """Wakes everybody who waits."""
        waiters, self._waiters = self._waiters, set()
        for one in waiters:
            if not one.done():
                one.set_result(None)

    async def wait(self) -> None:
        """Returns at the next change."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    async def until(self, predicate: Callable[[], bool], timeout: float) -> None:
        """Returns as soon as it is true.

        Raises:
            TimeoutError: it is still false after `timeout` seconds.
        """
        async with asyncio.timeout(timeout):
            while not predicate():
                await self.wait()
