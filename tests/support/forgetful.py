"""A deployment whose decode ranks lose one KV block: what a test of identity must notice.

`python -m support.forgetful up OPTIONS` is `sps2 up OPTIONS` with decode ranks in which the first block of
every request's local KV is zeroed between its delivery and its first step. Nothing else differs.
"""

import os
import sys
from pathlib import Path
from unittest.mock import patch

TESTS = Path(__file__).resolve().parents[1]
PROGRAM = (sys.executable, "-P", "-m", "support.forgetful")
ENGINE = "support.forgetful"
ENV = {"PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])}
"""Where the program and its engines are found."""


# Imports stand where they are needed: each of the three roles is a process of its own.


def run_up() -> None:
    from sps2_cli.local.plan import Commands
    from sps2_cli.main import app

    commands = Commands(decode=(*PROGRAM, "decode"))
    with patch("sps2_cli.up.Commands", lambda: commands):
        app(sys.argv[1:], prog_name="sps2")


def run_supervisor() -> int:
    from sps2_decode_worker import __main__ as worker
    from sps2_service.ranks.worker import run_worker

    del sys.argv[1]
    with patch.object(worker, "run_worker", lambda c, r, _engine, *rest: run_worker(c, r, ENGINE, *rest)):
        return worker.main()


def run_engine() -> None:
    from sps2.internal.v1 import engine_pb2
    from sps2_decode_worker.loop import DecodeRole
    from sps2_engine.kv_pool import BLOCK_TOKENS
    from sps2_engine.runtime import main
    from sps2_service.telemetry import configure_logging

    class ForgetfulRole(DecodeRole):
        def execute(self, command: engine_pb2.EngineCommand) -> None:
            for admit in command.step_plan.admit:
                for block in self._rows[admit.row].blocks[:1]:
                    lost = slice(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS)
                    self._model.arena.k[:, lost] = 0
                    self._model.arena.v[:, lost] = 0
            super().execute(command)

    main.run_engine(ForgetfulRole, configure_logging)


if __name__ == "__main__":
    match sys.argv[1]:
        case "up":
            run_up()
        case "decode":
            sys.exit(run_supervisor())
        case _:  # a supervisor starts its engine with the engine's own flags
            run_engine()
