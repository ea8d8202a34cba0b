"""gRPC channels from one service to another: quick to notice a dead peer, finite in everything, no retries.

The router is the one owner of retries; a channel only reconnects. Deadlines are the caller's: see `deadline`.
"""

import json
from dataclasses import dataclass
from typing import Any

import grpc

from sps2_service.tls import Tls

MAX_MESSAGE_BYTES = 32 * 1024 * 1024

_ROUND_ROBIN = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})


@dataclass(frozen=True)
class ChannelOptions:
    """How a channel behaves; the defaults notice a stopped or cut-off peer within about 4 s."""

    keepalive_s: float = 2.0
    """A silent connection is pinged this often; the server must allow it (`server.ServerOptions`)."""
    keepalive_timeout_s: float = 1.0
    """A ping unanswered for this long ends the connection, and its calls with UNAVAILABLE."""
    max_message_bytes: int = MAX_MESSAGE_BYTES
    """Larger messages, either way, end the call with RESOURCE_EXHAUSTED."""
    connect_timeout_s: float = 1.0
    """A peer that accepts a connection and then says nothing (stopped, overloaded) is given up after this."""
    reconnect_min_s: float = 0.1
    """Pause before the first reconnect; doubles up to reconnect_max_s."""
    reconnect_max_s: float = 2.0
    """Longest pause between reconnects: a restarted peer is found again within this time."""

    def arguments(self) -> list[tuple[str, Any]]:
        """The same as gRPC channel arguments."""
        return [
            ("grpc.keepalive_time_ms", round(self.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", round(self.keepalive_timeout_s * 1000)),
            # Without this one a ping that follows no data waits for its answer for a minute.
            ("grpc.http2.ping_timeout_ms", round(self.keepalive_timeout_s * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.initial_reconnect_backoff_ms", round(self.reconnect_min_s * 1000)),
            # Despite its name this is the time limit of one attempt; 20 s by default.
            ("grpc.min_reconnect_backoff_ms", round(self.connect_timeout_s * 1000)),
            ("grpc.max_reconnect_backoff_ms", round(self.reconnect_max_s * 1000)),
            ("grpc.dns_min_time_between_resolutions_ms", 1000),
            ("grpc.service_config", _ROUND_ROBIN),
            ("grpc.enable_retries", 0),
            # Services speak to each other directly, whatever http_proxy says.
            ("grpc.enable_http_proxy", 0),
            # Channels do not share connections, so that one channel's end or backoff is no other's.
            ("grpc.use_local_subchannel_pool", 1),
        ]


def open_channel(
    target: str,
    *,
    tls: Tls | None = None,
    options: ChannelOptions = ChannelOptions(),
) -> grpc.aio.Channel:
    """An aio channel; connects on its first call. Close it, or use it as `async with`.

    Args:
        target: `HOST:PORT` (all addresses of HOST, in turn), or any gRPC target: `unix:/path`, `dns:///...`.
        tls: None for plaintext.
        options: See ChannelOptions.

    Raises:
        OSError: a file of `tls` cannot be read.
    """
    if "://" not in target and not target.startswith(("unix:", "unix-abstract:", "ipv4:", "ipv6:", "dns:")):
        target = f"dns:///{target}"
    if tls is None:
        return grpc.aio.insecure_channel(target, options=options.arguments())
    arguments = [*options.arguments(), *tls.channel_arguments()]
    return grpc.aio.secure_channel(target, tls.channel_credentials(), options=arguments)


def deadline(context: "grpc.aio.ServicerContext[Any, Any]", cap: float) -> float:
    """The timeout (s) for a call made on behalf of `context`: what its caller has left, at most `cap`.

    Zero when the caller's deadline has passed: such a call fails at once with DEADLINE_EXCEEDED.
    """
    remaining: float | None = context.time_remaining()  # None without a deadline, whatever the stubs say
    return cap if remaining is None else max(0.0, min(cap, remaining))
