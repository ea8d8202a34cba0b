"""The shell line that starts the chart's own Redis, run for real: its password counts, and nothing is kept."""

import os
from collections.abc import Callable
from contextlib import suppress

import pytest
import redis

from support.chart import render
from support.ports import free_port
from support.process import ManagedProcess
from support.redis_server import find_redis_server
from support.waiting import wait_until


def test_it_asks_for_the_password(processes: Callable[..., ManagedProcess]) -> None:
    (workload,) = render().part("redis")
    (container,) = workload.containers
    port = free_port()
    script = container["args"][0].replace("port 6379", f"port {port}")
    path = f"{find_redis_server().parent}:{os.environ['PATH']}"
    process = processes([*container["command"], script], env={"PATH": path, "REDIS_PASSWORD": "hunter2"})
    process.wait_for_line("Ready to accept connections", timeout=20)
    with redis.Redis(port=port, password="hunter2", socket_timeout=5) as client:

        def answers() -> bool:
            with suppress(redis.ConnectionError):
                return bool(client.ping())
            return False

        wait_until(answers, timeout=10)
        assert client.config_get("save") == {"save": ""}
        assert client.config_get("appendonly") == {"appendonly": "no"}
    with redis.Redis(port=port, socket_timeout=5) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()
