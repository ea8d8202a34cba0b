"""One channel per leader, shared by all requests; closed once the leader is gone and nothing uses it."""

from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc

from sps2_service.channel import open_channel
from sps2_service.tls import Tls


@dataclass
class _Entry:
    channel: grpc.aio.Channel
    num_users: int = 0


class LeaderChannels:
    """Channels by address."""

    def __init__(self, live_addresses: Callable[[], Collection[str]], tls: Tls | None = None) -> None:
        """`live_addresses` gives the addresses that the membership view has now; `tls` None: plaintext."""
        self._tls = tls
        self._live_addresses = live_addresses
        self._entries: dict[str, _Entry] = {}

    @asynccontextmanager
    async def use(self, address: str) -> AsyncIterator[grpc.aio.Channel]:
        """The channel to `address`, kept open while the block runs."""
        entry = self._entries.get(address)
        if entry is None:
            await self._close_unused()
            entry = self._entries.setdefault(address, _Entry(open_channel(address, tls=self._tls)))
        entry.num_users += 1
        try:
            yield entry.channel
        finally:
            entry.num_users -= 1

    async def _close_unused(self) -> None:
        live = frozenset(self._live_addresses())
        gone = [a for a, entry in self._entries.items() if entry.num_users == 0 and a not in live]
        for entry in [self._entries.pop(address) for address in gone]:
            await entry.channel.close(None)

    async def close(self) -> None:
        """Closes every channel; calls on them end."""
        entries, self._entries = list(self._entries.values()), {}
        for entry in entries:
            await entry.channel.close(None)
