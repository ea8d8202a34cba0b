"""Tells the directory, in the background, where the KV of each attempt of a decode group lies."""

import asyncio

from sps2_decode_worker.attempts import LiveAttempt
from sps2_decode_worker.messages import FormedGroup, shard_record
from sps2_service.directory_client import DirectoryClient

RECORD_LEASE_S = 60.0
"""How long the directory keeps a record of shards that is not renewed."""
RECORD_SOON_S = 0.5
"""How long after blocks have moved the directory is told, at most."""


class ShardRecords:
    """Of all attempts; each is told again until it is released."""

    def __init__(self, directory: DirectoryClient) -> None:
        self._directory = directory

    def keep(self, group: FormedGroup, live: LiveAttempt) -> None:
        """Tells now, and again for as long as the attempt lives."""
        self._directory.record_shards(shard_record(group, live), RECORD_LEASE_S)
        loop = asyncio.get_running_loop()
        live.record_timer = loop.call_later(RECORD_LEASE_S / 3, self.keep, group, live)

    def soon(self, group: FormedGroup, live: LiveAttempt) -> None:
        """Of what moves in many steps the directory is told once."""
        loop = asyncio.get_running_loop()
        if live.record_timer is not None and live.record_timer.when() > loop.time() + RECORD_SOON_S:
            live.record_timer.cancel()
            live.record_timer = loop.call_later(RECORD_SOON_S, self.keep, group, live)

    def release(self, live: LiveAttempt) -> None:
        """The attempt is over; one that was never told of is no news."""
        if live.record_timer is not None:
            live.record_timer.cancel()
            self._directory.release(live.request.attempt)
