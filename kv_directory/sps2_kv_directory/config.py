"""What the directory can be told; the defaults keep the design's promises."""

from dataclasses import dataclass
from pathlib import Path

from redis.asyncio.connection import parse_url

from sps2_service.config import ServiceConfig, setting


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """How the store speaks to Redis and counts time."""

    namespace: str = "sps2"
    """First part of every key; one Redis may hold several directories."""
    lease_ttl_s: float = 5.0
    """Seconds until a worker's lease ends without renewal."""
    timeout_s: float = 0.5
    """Longest wait for one script."""
    pause_s: float = 0.25
    """After a failed script no other is tried for this long."""
    max_connections: int = 16
    """Connections to Redis."""

    @property
    def max_clock_step_s(self) -> float:
        """A longer silence, or jump of the wall clock, is no time passed: leases stand still and get one TTL.

        Shorter ones are harmless: a worker that renews every fifth of a TTL survives them.
        """
        return 0.4 * self.lease_ttl_s


@dataclass(frozen=True, kw_only=True)
class DirectoryConfig(ServiceConfig):
    """The KV directory: who lives, where each request's KV lies, leases and fences. Its state is in Redis."""

    redis: str = "redis://127.0.0.1:6379/0"
    """URL of Redis, redis:// or (TLS) rediss://, with the user if it has one; it may be away when the directory
    starts."""
    redis_password: str | None = setting(None, secret=True)
    """Password for Redis."""
    redis_password_file: Path | None = None
    """File that holds the password for Redis, in place of the variable."""
    namespace: str = "sps2"
    """First part of every key; one Redis may hold several directories."""
    max_connection_age_s: float | None = setting(1800.0, minimum=1)
    """Seconds after which a connection is closed once its calls have ended, so that callers find new replicas; empty:
    never."""
    lease_ttl_s: float = setting(5.0, minimum=0.5)
    """Seconds until a worker's lease ends without renewal."""
    renew_interval_s: float = setting(1.0, minimum=0.05)
    """Seconds between renewals, as workers are told."""
    expire_interval_s: float = setting(0.5, minimum=0.01)
    """Seconds between looks for leases that are over."""
    watch_interval_s: float = setting(0.1, minimum=0.01)
    """Seconds between looks for changes of workers."""
    watch_max_queued: int = setting(4096, minimum=1)
    """Changes that a watcher may lag behind before it is cut."""
    store_timeout_s: float = setting(0.5, minimum=0.01)
    """Longest wait for Redis; then renewals are answered DEGRADED and other calls UNAVAILABLE."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            parse_url(self.redis)
        except ValueError:
            # Its own message may hold a part of a password.
            raise ValueError(
                "--redis must be redis:// or rediss://, special characters percent-encoded"
            ) from None
        if self.redis_password is not None and self.redis_password_file is not None:
            raise ValueError("give the password of Redis or its file, not both")
        # A lease must survive a lost renewal, and a slow look for leases must not pass for an outage.
        if self.renew_interval_s > 0.4 * self.lease_ttl_s:
            raise ValueError("renew_interval_s must be at most 0.4 of lease_ttl_s")
        if self.expire_interval_s + self.store_timeout_s > 0.4 * self.lease_ttl_s:
            raise ValueError("expire_interval_s + store_timeout_s must be at most 0.4 of lease_ttl_s")

    def read_redis_password(self) -> str | None:
        """The password, None without one. Raises OSError when its file cannot be read."""
        if self.redis_password_file is None:
            return self.redis_password
        return self.redis_password_file.read_text("utf-8").rstrip("\n")

    @property
    def store(self) -> StoreConfig:
        """The store's part."""
        return StoreConfig(
            namespace=self.namespace, lease_ttl_s=self.lease_ttl_s, timeout_s=self.store_timeout_s
        )
