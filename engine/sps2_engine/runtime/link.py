"""The engine's end of the socket to its supervisor: frames of a 4-byte little-endian length and one message."""

import logging
import os
import socket
import struct
import threading
from collections.abc import Callable

from sps2.internal.v1 import engine_pb2

_LENGTH = struct.Struct("<I")
_log = logging.getLogger(__name__)


class SupervisorLink:
    """Sends events from any thread; a thread of its own reads commands.

    An engine without a supervisor has no reason to live: when the socket ends, so does the process.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()

    def send(self, event: engine_pb2.EngineEvent) -> None:
        """Sends one event; a supervisor that is gone ends the process."""
        body = event.SerializeToString()
        try:
            with self._sending:
                self._connection.sendall(_LENGTH.pack(len(body)) + body)
        except OSError:
            _leave()

    def start(self, on_command: Callable[[engine_pb2.EngineCommand], None]) -> None:
        """Starts to read; `on_command` is called on the reading thread for each command, in order."""
        threading.Thread(target=self._read, args=(on_command,), name="supervisor-link", daemon=True).start()

    def _read(self, on_command: Callable[[engine_pb2.EngineCommand], None]) -> None:
        with self._connection.makefile("rb") as stream:
            while True:
                try:
                    head = stream.read(_LENGTH.size)
                    body = stream.read(_LENGTH.unpack(head)[0]) if len(head) == _LENGTH.size else b""
                except OSError:
                    _leave()
                if len(head) < _LENGTH.size:
                    _leave()
                on_command(engine_pb2.EngineCommand.FromString(body))


def _leave() -> None:
    _log.info("the supervisor is gone, the engine ends")
    os._exit(0)
