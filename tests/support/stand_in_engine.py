"""`python -m support.stand_in_engine MODE FD`: what a supervisor sees of an engine, without one.

Modes: `ready` loads at once and echoes the epochs of commands in heartbeats; `mute` says nothing after its first
heartbeat; `busy` is busy without progress; `bad` has a bad checkpoint; `crash` ends with status 7 once loaded.
"""

import os
import socket
import sys
import threading

from sps2.internal.v1 import engine_pb2
from sps2_engine.runtime.link import SupervisorLink


def main() -> None:
    mode, link = sys.argv[1], SupervisorLink(socket.socket(fileno=int(sys.argv[2])))
    if mode == "bad":
        failed = engine_pb2.LoadFailed(reason="tensor 'x' is missing; copy the folder again")
        link.send(engine_pb2.EngineEvent(load_failed=failed))
        sys.exit(3)
    ended = threading.Event()

    def on_command(command: engine_pb2.EngineCommand) -> None:
        if command.HasField("shutdown"):
            ended.set()
        elif not command.HasField("hold_lease"):
            link.send(engine_pb2.EngineEvent(epoch=command.epoch, group_formed=engine_pb2.GroupFormed()))

    link.start(on_command)
    link.send(engine_pb2.EngineEvent(loaded=engine_pb2.EngineLoaded(device="cpu")))
    if mode == "crash":
        os._exit(7)
    beat = engine_pb2.Heartbeat(steps_done=1, busy=mode == "busy")
    while True:
        link.send(engine_pb2.EngineEvent(heartbeat=beat))
        if ended.wait(None if mode == "mute" else 0.05):
            return


if __name__ == "__main__":
    main()
