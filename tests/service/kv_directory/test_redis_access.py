"""Redis behind TLS, a password and an access list of just what the directory needs."""

import asyncio
import ssl
import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from redis.asyncio import Redis

from sps2_kv_directory.config import StoreConfig
from sps2_kv_directory.script_runner import ScriptRunner
from sps2_kv_directory.store import Store
from sps2_service.directory_registration import renewal_of
from sps2_service.errors import Unavailable
from support.directory import DirectoryProcess, make_record, make_worker
from support.ports import free_port
from support.redis_server import RedisServer

pytestmark = pytest.mark.service

# docs/kv_directory.md has the same list.
COMMANDS = [
    *("evalsha", "script|load", "time", "info", "unlink"),
    *("hexists", "hset", "hmget", "hget", "hdel", "hlen", "hvals", "hincrby"),
    *("xadd", "xrange", "zadd", "zrem", "zrangebyscore", "zrangebylex", "rpush", "lindex", "lpop"),
]


async def with_user(redis_server: RedisServer, *commands: str) -> None:
    """Lets in the user sps2 alone, with these commands on the directory's keys."""
    client = Redis.from_url(redis_server.url)
    rules = ["on", ">open", "~{sps2}:*", *(f"+{command}" for command in commands)]
    await client.execute_command("ACL", "SETUSER", "sps2", *rules)  # type: ignore[no-untyped-call]
    await client.execute_command("ACL", "SETUSER", "default", "off")  # type: ignore[no-untyped-call]
    await client.aclose()


def url(redis_server: RedisServer, user: str = "sps2") -> str:
    return redis_server.url.replace("redis://", f"redis://{user}@")


async def test_the_documented_commands_are_all_that_it_needs(redis_server: RedisServer) -> None:
    await with_user(redis_server, *COMMANDS)
    store = Store(ScriptRunner.connect(url(redis_server), StoreConfig(timeout_s=3), password="open"))
    worker = make_worker()
    await store.register(worker)
    await store.renew([renewal_of(make_worker(epoch=8))])
    await store.record(make_record(), 0.001)
    await store.locate("r")
    await store.draw_epoch("decode-0")
    await store.find_prefix([b"key"])
    state = await store.state()
    assert await store.changes(state.log, 0) is not None
    await store.expire()
    await store.deregister(worker.worker_id, worker.process_incarnation)
    await store.close()


async def test_without_a_right_the_store_is_away(redis_server: RedisServer) -> None:
    await with_user(redis_server)
    store = Store(ScriptRunner.connect(url(redis_server), StoreConfig(timeout_s=3), password="open"))
    with pytest.raises(Unavailable, match="permission"):
        await store.state()
    await store.close()


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A key, and a certificate of localhost that it has signed itself."""
    key, certificate = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        [
            *(
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-days",
                "2",
                "-subj",
                "/CN=localhost",
            ),
            *("-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
        timeout=30,
    )
    return key, certificate


@asynccontextmanager
async def tls_in_front(redis_server: RedisServer, folder: Path) -> AsyncGenerator[tuple[int, Path]]:
    """The port of a TLS server that hands everything on to Redis, and its certificate."""
    key, certificate = await asyncio.to_thread(make_certificate, folder)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)

    async def hand_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_redis = await asyncio.open_connection("127.0.0.1", redis_server.port)
        with suppress(ConnectionError, asyncio.CancelledError):
            await asyncio.gather(copy(reader, to_redis[1]), copy(to_redis[0], writer))

    port = free_port()
    server = await asyncio.start_server(hand_on, "127.0.0.1", port, ssl=context)
    try:
        yield port, certificate
    finally:
        server.close()


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


async def test_tls_takes_a_server_whose_certificate_is_known_and_no_other(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async with tls_in_front(redis_server, tmp_path) as (port, certificate):
        at = f"rediss://localhost:{port}/0"
        known = Store(ScriptRunner.connect(f"{at}?ssl_ca_certs={certificate}", StoreConfig(timeout_s=5)))
        await known.register(make_worker())
        assert len((await known.state()).workers) == 1
        await known.close()
        for wrong in (at, f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate}"):
            unknown = Store(ScriptRunner.connect(wrong, StoreConfig(timeout_s=5)))
            with pytest.raises(Unavailable):
                await unknown.state()
            await unknown.close()


async def test_a_password_file_that_is_absent_is_said_in_one_line(tmp_path: Path) -> None:
    directory = DirectoryProcess("redis://127.0.0.1:1/0", "--redis-password-file", str(tmp_path / "none"))
    with pytest.raises(AssertionError, match="the password of Redis cannot be read"):
        await asyncio.to_thread(directory.start)
