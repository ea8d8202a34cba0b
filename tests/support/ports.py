"""Free TCP ports on loopback, for what cannot take port 0 and report the port it got."""

import socket
from contextlib import ExitStack


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
