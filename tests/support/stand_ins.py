"""Stand-ins for the services of a local deployment, and `sps2 up` with them in place of the real ones.

`stand_ins.py up OPTIONS` is `sps2 up OPTIONS`; `stand_ins.py ROLE FLAGS` is what it then starts as directory,
router, prefill or decode: a process that listens, announces itself and ends on SIGTERM. A file `fail-NAME`
or `stubborn-NAME` in the model folder (NAME as in `prefill-0-1` or `router`) makes that process fail at its
start, or ignore SIGTERM; with `never-ready` the router reports ranks that never get ready.
"""

import argparse
import os
import signal
import socket
import sys
import threading
from pathlib import Path

ROLES = ("directory", "router", "prefill", "decode")


# Imports stand where they are needed: most stand-ins need none, and they start a dozen at a time.


def main() -> None:
    role = sys.argv[1]
    if role == "up":
        run_up()
    else:
        stand_in(role, sys.argv[2:])


def run_up() -> None:
    from unittest.mock import patch

    from sps2_cli.local.plan import Commands
    from sps2_cli.main import app

    commands = Commands(**{role: (sys.executable, "-P", __file__, role) for role in ROLES})
    with patch("sps2_cli.up.Commands", lambda: commands):
        app(sys.argv[1:], prog_name="sps2")


def stand_in(role: str, arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in (
        "listen",
        "redis",
        "directory",
        "model",
        "model-name",
        "profile",
        "group",
        "rank",
        "group-size",
        "leader",
    ):
        parser.add_argument(f"--{flag}")
    for flag in ("device", "dtype", "kv-tokens", "threads", "kv-transport", "exchange", "tp", "drain-s"):
        parser.add_argument(f"--{flag}")
    for flag in ("policy", "max-queue-s", "sharing", "prefix-fetch"):
        parser.add_argument(f"--{flag}")
    parser.add_argument("--announce-fd", type=int)
    flags = parser.parse_args(arguments)
    name = role if flags.group is None else f"{flags.group}-{flags.rank}"
    model = Path(flags.model or "/nonexistent")
    if role == "directory" and flags.redis and "127.0.0.1" in flags.redis:
        assert os.environ["SPS2_REDIS_PASSWORD"] not in " ".join(sys.argv)
    if flags.rank not in {None, "0"}:
        assert flags.leader is not None
        host, _, port = flags.leader.rpartition(":")
        socket.create_connection((host, int(port)), 5).close()
    if (model / f"fail-{name}").exists():
        sys.exit(f"{name}: model.safetensors: tensor lm_head.weight is missing")
    serve(role, name, flags, stubborn=(model / f"stubborn-{name}").exists())


def serve(role: str, name: str, flags: argparse.Namespace, *, stubborn: bool) -> None:
    ended = threading.Event()
    signal.signal(signal.SIGTERM, signal.SIG_IGN if stubborn else lambda *_: ended.set())
    if role == "router":
        from sps2.v1 import cluster_pb2
        from support.fake_router import FakeRouter

        router = FakeRouter()
        if (Path(flags.model) / "never-ready").exists():
            for worker in router.cluster:
                worker.state, worker.load.load_fraction = cluster_pb2.WORKER_STATE_STARTING, 0.5
        address = router.start(flags.listen).address
    else:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        host, _, port = flags.listen.rpartition(":")
        listener.bind((host, int(port)))
        listener.listen()
        address = f"{host}:{listener.getsockname()[1]}"
    if flags.announce_fd is not None:
        os.write(flags.announce_fd, f"{address}\n".encode())
        os.close(flags.announce_fd)
    sys.stderr.write(f'{{"event": "serving {name}", "level": "info", "address": "{address}"}}\n')
    while not ended.wait(0.1):
        pass


if __name__ == "__main__":
    main()
