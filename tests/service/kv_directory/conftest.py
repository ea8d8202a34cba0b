"""A Redis server for each test, and a store on it under simulated time."""

from collections.abc import AsyncGenerator

import pytest

from sps2_kv_directory.config import StoreConfig
from sps2_kv_directory.script_runner import ScriptRunner
from sps2_kv_directory.store import Store
from support.directory import SimulatedClock, recover, start_directory
from support.redis_server import RedisServer, redis_server

__all__ = ["redis_server", "start_directory"]


@pytest.fixture
def clock() -> SimulatedClock:
    """What the store under test takes for Redis TIME."""
    return SimulatedClock()


@pytest.fixture
async def store(redis_server: RedisServer, clock: SimulatedClock) -> AsyncGenerator[Store]:
    """A store whose leases last 5 s of simulated time; it has recovered from being new."""
    store = Store(ScriptRunner.connect(redis_server.url, StoreConfig(timeout_s=3), now_us=clock))
    await recover(store, clock)
    yield store
    await store.close()
