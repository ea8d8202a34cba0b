"""What the control plane's suite shares: a Redis server of each test's own."""

from support.redis_server import redis_server

__all__ = ["redis_server"]
