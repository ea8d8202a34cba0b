"""Limits and channel settings, with the reasons for their values."""

import json
import time
from dataclasses import dataclass

DEFAULT_UNARY_TIMEOUT_S = 10.0
"""For calls that only look something up."""
DEFAULT_WATCH_TIMEOUT_S = 3600.0
"""For calls that stream what happens."""
RESIZE_TIMEOUT_S = 70.0
"""A little longer than the service itself waits for a resize."""

MAX_MESSAGE_BYTES = 32 * 1024 * 1024
"""Limit of the wire in both directions."""

RETRY_DELAYS_S = (0.1, 0.3, 1.0)
"""Waits before the retries of a lost connection; the last repeats."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long a generation may take, in seconds; None is no limit of its own.

    Passing a plain number where `timeout` is asked for sets `total`.
    """

    total: float = 3600.0
    """The whole call with its retries, until the last event."""
    first_token: float | None = None
    """Until the first event. None: a long prompt may queue and prefill as long as `total` allows."""
    between_tokens: float | None = 300.0
    """From one event to the next; the service itself ends a stream that stands still that long."""

    def __post_init__(self) -> None:
        for name in ("total", "first_token", "between_tokens"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"timeout {name} must be positive, not {value}")

    @classmethod
    def of(cls, timeout: "Timeouts | float | None") -> "Timeouts":
        """`timeout` as callers may give it: nothing, seconds in all, or all three limits."""
        if timeout is None:
            return cls()
        return timeout if isinstance(timeout, Timeouts) else cls(total=timeout)


class Deadline:
    """A point in time that all tries of one call share."""

    def __init__(self, seconds: float) -> None:
        self._at = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self._at - time.monotonic())


def retry_delay(attempt: int) -> float:
    """Seconds to wait before retry number `attempt` (from 0)."""
    return RETRY_DELAYS_S[min(attempt, len(RETRY_DELAYS_S) - 1)]


def channel_options() -> list[tuple[str, int | str]]:
    """Settings of every channel.

    A peer that falls silent (stopped, cut off) is noticed in under 5 s: a ping after 2 s of silence, 1 s for
    its answer. Without `ping_timeout_ms` gRPC waits a minute for that answer.
    """
    return [
        ("grpc.keepalive_time_ms", 2000),
        ("grpc.keepalive_timeout_ms", 1000),
        ("grpc.http2.ping_timeout_ms", 1000),
        ("grpc.http2.max_pings_without_data", 0),  # a stream is silent while it waits for its first token
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 5000),  # also the time allowed to connect
        ("grpc.max_reconnect_backoff_ms", 5000),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.enable_retries", 0),  # a hidden retry would not carry the contract's nonce logic
        (
            "grpc.enable_http_proxy",
            0,
        ),  # a proxy of the environment is for the web, not for a router beside us
        # Several routers behind one name share the load.
        ("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})),
        ("grpc.service_config_disable_resolution", 1),
    ]
