"""How `sps2 scale` speaks to the `sps2 up` of the same user on the same machine: JSON lines over a Unix socket.

The socket has an abstract name made of the user and the router's port, so it lies in no folder, goes with its process,
and is found by whoever knows the router's address. One line asks, lines of events answer, the last one says how it
ended. Neither end waits for the other: `sps2 up` looks at the socket between two looks at its children.
"""

import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

MAX_LINE_BYTES = 4096
ASK_PATIENCE_S = 2.0
"""A connection that has not asked by then is closed."""
SAY_PATIENCE_S = 1.0
CONNECT_TIMEOUT_S = 2.0
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid

Event = dict[str, Any]


def socket_name(port: int) -> str:
    """Where the deployment listens whose router has this port."""
    return f"\0sps2-up-{os.geteuid()}-{port}"


def is_ours(connection: socket.socket) -> bool:
    """Whether the other end is a process of the same user: abstract names have no owner."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(found)[1] == os.geteuid())


class Call:
    """One request that has come."""

    def __init__(self, connection: socket.socket, asked: Event) -> None:
        self.asked = asked
        self._connection = connection
        self._connection.settimeout(SAY_PATIENCE_S)

    def say(self, kind: str, **fields: object) -> None:
        """Tells the caller; one that has gone, or does not read, misses it."""
        with contextlib.suppress(OSError):
            self._connection.sendall(json.dumps({"event": kind, **fields}).encode() + b"\n")

    def end(self, kind: str, **fields: object) -> None:
        """The last word."""
        self.say(kind, **fields)
        self._connection.close()


class ControlServer:
    """The end of `sps2 up`; everything on its main thread."""

    def __init__(self, port: int) -> None:
        """Raises OSError when there is another one with this port."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._listener.bind(socket_name(port))
            self._listener.listen(8)
        except OSError:
            self._listener.close()
            raise
        self._asking: dict[socket.socket, tuple[float, bytes]] = {}
        """When it came and what it has said so far, of connections that have not asked yet."""

    def poll(self) -> Call | None:
        """The next request, if one is complete; never waits."""
        self._accept()
        for connection in list(self._asking):
            if (call := self._read(connection)) is not None:
                return call
        return None

    def close(self) -> None:
        """Listens no more."""
        for connection in self._asking:
            connection.close()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):  # nobody is there
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            if is_ours(connection):
                self._asking[connection] = (time.monotonic(), b"")
            else:
                connection.close()

    def _read(self, connection: socket.socket) -> Call | None:
        came_at, said = self._asking[connection]
        try:
            said += connection.recv(MAX_LINE_BYTES)
        except BlockingIOError:
            pass
        except OSError:
            came_at = -ASK_PATIENCE_S
        if said.endswith(b"\n"):
            del self._asking[connection]
            return _parse(connection, said)
        if len(said) > MAX_LINE_BYTES or time.monotonic() - came_at > ASK_PATIENCE_S:
            del self._asking[connection]
            connection.close()
        else:
            self._asking[connection] = (came_at, said)
        return None


def _parse(connection: socket.socket, line: bytes) -> Call | None:
    try:
        asked = json.loads(line)
    except ValueError:
        asked = None
    if isinstance(asked, dict):
        return Call(connection, asked)
    connection.close()
    return None


def ask(port: int, request: Event) -> Iterator[Event]:
    """Asks the deployment and gives its events as they come.

    Raises:
        OSError: there is none, or it is not ours.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(CONNECT_TIMEOUT_S)
        connection.connect(socket_name(port))
        if not is_ours(connection):
            raise PermissionError("the deployment is another user's")
        connection.settimeout(
            None
        )  # it ends, and with it the connection, or it answers within its own limits
        connection.sendall(json.dumps(request).encode() + b"\n")
        with connection.makefile("rb") as lines:
            for line in lines:
                yield json.loads(line)
