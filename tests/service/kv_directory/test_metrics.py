"""The metrics of a directory process, with a real Redis."""

import asyncio
from collections.abc import Callable

import pytest

from sps2_service.directory_client import DirectoryClient
from sps2_service.errors import ServiceError
from support.directory import DirectoryProcess, make_worker
from support.metrics import Scrape, scrape
from support.ports import free_port
from support.redis_server import RedisServer
from support.waiting import wait_until

pytestmark = pytest.mark.service

Condition = Callable[[Scrape], bool]
WORKERS, EXPIRED = "sps2_directory_workers", "sps2_directory_leases_expired_total"


async def test_leases_calls_and_the_store(
    redis_server: RedisServer, start_directory: Callable[..., DirectoryProcess]
) -> None:
    address = f"127.0.0.1:{free_port()}"
    flags = ("--lease-ttl-s", "1", "--renew-interval-s", "0.2", "--expire-interval-s", "0.05")
    more = ("--store-timeout-s", "0.3", "--metrics-port", address)
    directory = start_directory(redis_server.url, *flags, *more)

    async def until(condition: Condition) -> Scrape:
        await asyncio.to_thread(wait_until, lambda: condition(scrape(address)), 10)
        return await asyncio.to_thread(scrape, address)

    async with DirectoryClient(directory.address) as client:
        registering = asyncio.ensure_future(client.keep_registered(make_worker))
        seen = await until(lambda seen: seen.value(WORKERS, role="decode", state="ready") == 1)
        assert seen.total(WORKERS) == 1
        assert seen.total("sps2_directory_state") == 1
        assert seen.value("sps2_directory_revision") >= 1
        assert seen.value("sps2_directory_rpc_seconds_count", method="RegisterWorker") == 1
        assert seen.value("sps2_directory_requests") == seen.value("sps2_directory_prefixes") == 0
        with pytest.raises(ServiceError):
            await client.locate("x" * 65)
        seen = await asyncio.to_thread(scrape, address)
        error = {"method": "LocateRequest", "status": "INVALID_ARGUMENT"}
        assert seen.value("sps2_directory_rpc_errors_total", **error) == 1
        redis_server.stop()
        seen = await until(lambda seen: seen.value("sps2_directory_state", state="degraded") == 1)
        assert "sps2_directory_requests" not in seen.families, "nobody knows"
        assert seen.value(WORKERS, role="decode", state="ready") == 1
        redis_server.resume()
        registering.cancel()
        seen = await until(lambda seen: seen.value(EXPIRED, kind="worker") == 1)
        assert seen.value("sps2_directory_state", state="degraded") == 0
