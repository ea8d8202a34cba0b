"""The loop that ends leases. What is over is decided in Redis (`scripts/expire.lua`), by its clock.

It runs in every replica; that several run does no harm. Its steady pace also is what shows the store an
outage: a longer silence than `max_clock_step_s` does not count as time passed.
"""

import asyncio
import dataclasses
from collections.abc import Callable

import structlog

from sps2_kv_directory.store import Expired, Store
from sps2_service.errors import Unavailable

log = structlog.get_logger(__name__)


async def keep_expiring(store: Store, interval_s: float, on_expired: Callable[[Expired], None]) -> None:
    """Ends leases that are over, every `interval_s`, until cancelled; none while the store is away.

    `on_expired` is told what each look has ended.
    """
    while True:
        more = False
        try:
            expired = await store.expire()
        except Unavailable:
            pass  # nothing expires now; the runner has logged it
        else:
            more = expired.more
            on_expired(expired)
            if expired.num_workers or expired.num_requests or expired.num_prefix_keys:
                log.info("leases ended", **dataclasses.asdict(expired))
        if not more:
            await asyncio.sleep(interval_s)
