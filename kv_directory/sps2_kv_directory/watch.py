"""Hands worker changes to many watchers through bounded queues. Knows nothing about Redis or gRPC."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable

from sps2.internal.v1.kv_directory_service_pb2 import WatchWorkersResponse
from sps2_service.errors import Unavailable


class WatchHub:
    """The watchers of one replica. All of them get the same response objects; nobody changes these.

    A watcher that does not keep up is cut: its stream ends with UNAVAILABLE, and it watches again from a
    snapshot. So a slow reader costs a bounded queue, and never the others.
    """

    def __init__(self, max_queued: int) -> None:
        """`max_queued`: responses that a watcher may lag behind."""
        self._max_queued = max_queued
        self._watchers: set[_Watcher] = set()
        self._closed = False

    @property
    def num_watchers(self) -> int:
        """Watchers now."""
        return len(self._watchers)

    def publish(self, response: WatchWorkersResponse) -> None:
        """Queues a response for every watcher; never waits."""
        for watcher in list(self._watchers):
            if len(watcher.queue) >= self._max_queued:
                self._cut(watcher, "WATCH_TOO_SLOW", "the watcher lags too far behind: watch again")
            else:
                watcher.put(response)

    def close(self) -> None:
        """Ends all watches, now and later: this replica drains."""
        self._closed = True
        for watcher in list(self._watchers):
            self._cut(watcher, "DRAINING", "this directory replica is going away: watch another")

    async def watch(
        self, snapshot: Callable[[], WatchWorkersResponse]
    ) -> AsyncGenerator[WatchWorkersResponse]:
        """What `snapshot` returns as the watch begins, then everything published from then on.

        Raises:
            Unavailable: the watcher was cut, or the hub is closed.
        """
        if self._closed:
            raise Unavailable("DRAINING", "this directory replica is going away", retry_after=0.1)
        watcher = _Watcher()
        watcher.put(snapshot())
        self._watchers.add(watcher)
        try:
            while True:
                yield await watcher.next()
        finally:
            self._watchers.discard(watcher)

    def _cut(self, watcher: "_Watcher", reason: str, message: str) -> None:
        self._watchers.discard(watcher)
        watcher.cut(Unavailable(reason, message, retry_after=0.1))


class _Watcher:
    def __init__(self) -> None:
        self.queue: deque[WatchWorkersResponse] = deque()
        self._error: Unavailable | None = None
        self._changed = asyncio.Event()

    def put(self, response: WatchWorkersResponse) -> None:
        self.queue.append(response)
        self._changed.set()

    def cut(self, error: Unavailable) -> None:
        # What is queued is dropped: the watcher will begin with a newer snapshot anyway.
        self.queue.clear()
        self._error = error
        self._changed.set()

    async def next(self) -> WatchWorkersResponse:
        # Waits as long as nothing changes: a watch lives by keepalive, not by a deadline.
        while not self.queue:
            if self._error is not None:
                raise self._error
            self._changed.clear()
            await self._changed.wait()
        return self.queue.popleft()
