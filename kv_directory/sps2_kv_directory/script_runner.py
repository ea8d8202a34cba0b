"""Runs the store's Lua scripts by EVALSHA, in bounded time, and says in one way that Redis is away.

It knows the scripts' common head (`scripts/_prelude.lua`) and nothing of what they do.
"""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from importlib import resources
from typing import Any, Self, TypeVar, cast

import redis.exceptions
import structlog
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from sps2_kv_directory.config import StoreConfig
from sps2_service.errors import Unavailable

log = structlog.get_logger(__name__)

T = TypeVar("T")

# The order in which the prelude names them.
KEY_NAMES = (
    "directory", "workers", "worker_leases", "changes", "requests", "request_leases", "epochs",
    "prefixes", "prefix_index", "sweeps", "admissions", "admission_leases",
)  # fmt: skip
SCRIPT_NAMES = (
    "register", "renew", "deregister", "draw_epoch", "record_shards", "locate", "release", "state", "changes",
    "expire", "record_prefix", "find_prefix", "evict_prefix", "admit", "dismiss",
)  # fmt: skip
# Refusals of a living server that say "not now"; any other refusal is a bug in a script.
AWAY_PREFIXES = ("OOM", "MISCONF", "BUSY", "LOADING", "READONLY", "MASTERDOWN", "NOREPLICAS", "TRYAGAIN")


def away(message: str) -> Unavailable:
    """The error that says that the store cannot be used now."""
    return Unavailable("STORE_AWAY", message, retry_after=1.0)


class ScriptRunner:
    """Calls scripts on one Redis.

    After a failure, calls fail at once for `pause_s` without touching Redis: so a Redis that hangs costs one
    timeout now and then, and not one for each caller.
    """

    def __init__(self, client: Redis, config: StoreConfig, now_us: Callable[[], int] | None = None):
        """`now_us` replaces Redis TIME (tests); microseconds."""
        self._client = client
        self._config = config
        self._now_us = now_us
        self._keys = [f"{{{config.namespace}}}:{name}" for name in KEY_NAMES]
        folder = resources.files("sps2_kv_directory") / "scripts"
        prelude = (folder / "_prelude.lua").read_text("utf-8")
        self._scripts = {
            name: client.register_script(prelude + (folder / f"{name}.lua").read_text("utf-8"))
            for name in SCRIPT_NAMES
        }
        self._paused_until = 0.0
        self._answered_at = 0.0
        self.is_away = False
        """Whether it did not answer when it was asked last."""
        self.num_failures = 0
        """Calls that Redis did not answer, since the start."""

    @classmethod
    def connect(
        cls,
        url: str,
        config: StoreConfig,
        *,
        password: str | None = None,
        now_us: Callable[[], int] | None = None,
    ) -> Self:
        """A runner with its own connections to `url`; connects when first used, so Redis may be away now."""
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=config.max_connections,
            timeout=config.timeout_s,
            socket_timeout=config.timeout_s,
            socket_connect_timeout=config.timeout_s,
            retry=Retry(NoBackoff(), 0),  # the callers decide what is tried again
            **({} if password is None else {"password": password}),
        )
        return cls(Redis.from_pool(pool), config, now_us)

    async def run(self, name: str, *args: str | bytes | float) -> Any:
        """The reply of a script.

        Raises:
            Unavailable: Redis did not answer within `timeout_s`, or cannot do it now; the script may
                have run all the same.
        """
        if (wait := self._paused_until - time.monotonic()) > 0:
            raise away(f"the store failed just now; the next try is in {wait:.2f} s")
        head = (
            "" if self._now_us is None else self._now_us(),
            secrets.token_hex(16),
            round(self._config.lease_ttl_s * 1e6),
            round(self._config.max_clock_step_s * 1e6),
        )
        return await self._bounded(self._scripts[name](keys=self._keys, args=[*head, *args]))

    async def _bounded(self, call: Awaitable[T]) -> T:
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._config.timeout_s):
                reply = await call
        except (TimeoutError, redis.exceptions.TimeoutError):
            reason = f"the store did not answer within {self._config.timeout_s:g} s"
        except (redis.exceptions.ConnectionError, OSError) as error:
            reason = f"the store cannot be reached ({type(error).__name__})"
        except redis.exceptions.ResponseError as error:
            if not _says_away(error):
                raise
            reason = f"the store cannot do this now ({str(error)[:80]})"
        else:
            self._note_answer()
            return reply
        self._note_failure(began, reason)
        raise away(reason)

    def _note_answer(self) -> None:
        self._answered_at = time.monotonic()
        if self.is_away:
            self.is_away = False
            log.info("the store is back")

    def _note_failure(self, began: float, reason: str) -> None:
        self.num_failures += 1
        if self._answered_at > began:
            return  # late news: the store has answered another call since
        self._paused_until = time.monotonic() + self._config.pause_s
        if not self.is_away:
            self.is_away = True
            log.warning("the store is away", reason=reason)

    async def close(self) -> None:
        """Closes the connections."""
        # A connection to a server that is gone may fail to say goodbye; it is closed all the same.
        with suppress(redis.exceptions.RedisError, OSError, TimeoutError):
            async with asyncio.timeout(self._config.timeout_s):
                await self._client.aclose()


def _says_away(error: redis.exceptions.ResponseError) -> bool:
    # redis-py strips the prefix from the errors that it has classes for; an error inside a script keeps it
    # in the middle of its text.
    kinds = (
        redis.exceptions.OutOfMemoryError,
        redis.exceptions.ReadOnlyError,
        redis.exceptions.BusyLoadingError,
        redis.exceptions.NoPermissionError,
    )
    return isinstance(error, kinds) or any(prefix in str(error) for prefix in AWAY_PREFIXES)


def pairs(flat: Sequence[Any]) -> list[tuple[bytes, bytes]]:
    """A flat reply `kind, value, kind, value...` as pairs."""
    return cast("list[tuple[bytes, bytes]]", list(zip(flat[::2], flat[1::2], strict=True)))
