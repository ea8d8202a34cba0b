"""Tells the directory where KV lies, without anybody waiting for it.

What cannot be told is dropped and counted: a lost record costs a reuse or a remote cancel, never a stream.
"""

import asyncio
import zlib
from collections.abc import Awaitable, Callable

import structlog

from sps2_service.errors import NotFound, ServiceError

log = structlog.get_logger(__name__)

Send = Callable[[], Awaitable[object]]

NUM_LANES = 4


class Recorder:
    """Sends calls in the background, those of one request in the order in which they came."""

    def __init__(self, max_queued: int) -> None:
        """`max_queued`: calls that may wait, over all lanes."""
        self._lanes: list[asyncio.Queue[Send]] = [
            asyncio.Queue(max(1, max_queued // NUM_LANES)) for _ in range(NUM_LANES)
        ]
        self._tasks: list[asyncio.Task[None]] = []
        self._failing = False
        self.num_dropped = 0
        """Calls that were not sent, or failed, since the start."""

    def submit(self, request_id: str, send: Send) -> None:
        """Queues a call for a request; returns at once. Needs a running event loop."""
        if not self._tasks:
            self._tasks = [
                asyncio.create_task(self._run(lane), name="directory-recorder") for lane in self._lanes
            ]
        lane = self._lanes[zlib.crc32(request_id.encode()) % NUM_LANES]
        try:
            lane.put_nowait(send)
        except asyncio.QueueFull:
            self._drop("the queue is full")

    async def flush(self, timeout_s: float) -> None:
        """Waits until all that was queued is sent or dropped; raises TimeoutError after `timeout_s`."""
        async with asyncio.timeout(timeout_s):
            for lane in self._lanes:
                await lane.join()

    async def close(self) -> None:
        """Ends the senders; what is queued still is dropped."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    async def _run(self, lane: asyncio.Queue[Send]) -> None:
        while True:
            send = await lane.get()
            try:
                await send()
            except NotFound:
                self._note_success()  # a release of what has expired, or was never told
            except ServiceError as error:
                self._drop(str(error))
            else:
                self._note_success()
            finally:
                lane.task_done()

    def _drop(self, why: str) -> None:
        self.num_dropped += 1
        if not self._failing:
            log.warning("the directory is not told where KV lies", why=why)
        self._failing = True

    def _note_success(self) -> None:
        if self._failing:
            log.info("the directory is told again where KV lies", dropped_so_far=self.num_dropped)
        self._failing = False
