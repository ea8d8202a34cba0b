"""Free TCP ports and addresses on loopback, for what cannot take port 0 and report the port it got."""

import random
import socket
from contextlib import ExitStack

LEAST_PORT, EPHEMERAL_PORT = 20_000, 32_768
"""From the latter on the kernel gives ports to whoever asks for any."""
TRIES = 50


def free_port(host: str = "127.0.0.1") -> int:
    """A port that was free a moment ago; nothing holds it, so the caller binds it at once."""
    return free_ports(1, host)[0]


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """`count` different ports that were free a moment ago, held together while they are picked."""
    with ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) for _ in range(count)
        ]
        for one in sockets:
            one.bind((host, 0))
        return [one.getsockname()[1] for one in sockets]


def free_host() -> str:
    """An address of loopback that nobody else listens on, most likely, so that all its ports are free."""
    return f"127.{random.randrange(16, 255)}.{random.randrange(256)}.{random.randrange(1, 255)}"


def free_port_range(count: int, host: str = "127.0.0.1") -> int:
    """The first of `count` free ports in a row, which the kernel gives to nobody who asks for any."""
    for _ in range(TRIES):
        first = random.randrange(LEAST_PORT, EPHEMERAL_PORT - count)
        try:
            with ExitStack() as stack:
                for port in range(first, first + count):
                    one = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
                    one.bind((host, port))
        except OSError:
            continue
        return first
    raise AssertionError(f"no {count} free ports in a row")
