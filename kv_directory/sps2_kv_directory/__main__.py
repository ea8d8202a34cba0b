"""`python -m sps2_kv_directory`: one replica of the KV directory."""

import asyncio
import sys

from sps2.internal.v1 import kv_directory_service_pb2
from sps2_kv_directory.config import DirectoryConfig
from sps2_kv_directory.leases import keep_expiring
from sps2_kv_directory.membership import Membership
from sps2_kv_directory.metrics import DirectoryMetrics, MeteredCalls
from sps2_kv_directory.script_runner import ScriptRunner
from sps2_kv_directory.servicer import KvDirectoryServicer
from sps2_kv_directory.store import Store
from sps2_kv_directory.watch import WatchHub
from sps2_service.config import load_config
from sps2_service.metrics import service_registry
from sps2_service.run import EXIT_FAILED, prepare_process, run_service
from sps2_service.server import ServerOptions, server_for

SERVICE = kv_directory_service_pb2.DESCRIPTOR.services_by_name["KvDirectoryService"]


async def serve(config: DirectoryConfig) -> int:
    """Serves until SIGTERM; the exit code. Redis may be away, now and later."""
    try:
        password = config.read_redis_password()
    except OSError as error:
        sys.stderr.write(f"the password of Redis cannot be read: {error}\n")
        return EXIT_FAILED
    store = Store(ScriptRunner.connect(config.redis, config.store, password=password))
    hub = WatchHub(config.watch_max_queued)
    membership = Membership(store, hub, poll_interval_s=config.watch_interval_s)
    servicer = KvDirectoryServicer(
        store, membership, lease_ttl_s=config.lease_ttl_s, renew_interval_s=config.renew_interval_s
    )
    registry = service_registry("directory")
    metrics = DirectoryMetrics(registry, SERVICE)
    metrics.read(membership, hub, store)

    async def background() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(membership.run(), name="membership")
            group.create_task(keep_expiring(store, config.expire_interval_s, metrics.expired), name="leases")

    async def drain() -> None:
        await server.set_serving(False)
        hub.close()  # watches never end by themselves; the other calls are short

    options = ServerOptions(max_connection_age_s=config.max_connection_age_s)
    server = server_for(config, options, [MeteredCalls(metrics)])
    server.add(servicer, SERVICE)
    try:
        return await run_service(server, config, registry, background=background, drain=drain)
    finally:
        await store.close()


def main() -> int:
    """Configures the process and serves."""
    config = load_config(
        DirectoryConfig,
        prog="python -m sps2_kv_directory",
        examples=[
            "--listen 127.0.0.1:50060 --redis redis://127.0.0.1:6379/0",
            "--listen 0.0.0.0:50060 --redis rediss://sps2@redis:6380/0 --redis-password-file /run/secrets/redis",
        ],
    )
    prepare_process("kv_directory", config)
    return asyncio.run(serve(config))


if __name__ == "__main__":
    sys.exit(main())
