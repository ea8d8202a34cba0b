"""Starts an engine process of either role."""

import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Protocol

import torch

from sps2.internal.v1 import engine_pb2
from sps2_engine.models import CheckpointError
from sps2_engine.runtime.device import DTYPES, resolve_device, resolve_dtype, set_up_device, use_compile_cache
from sps2_engine.runtime.host import EngineHost, Role
from sps2_engine.runtime.link import SupervisorLink
from sps2_engine.runtime.options import EngineOptions, parse_engine_arguments

EXIT_BAD_CHECKPOINT = 3
"""Exit status that tells the supervisor: do not start me again, the model folder is at fault."""

_log = logging.getLogger(__name__)

MakeRole = Callable[[EngineOptions, torch.device, torch.dtype, SupervisorLink], Role]


class ConfigureLogging(Protocol):
    """Sets up logging as the supervisor has it; the engine itself does not know how."""

    def __call__(self, service: str, *, level: str, json: bool | None) -> None:
        """`service` is bound to every line; `json` None: text on a terminal."""


def run_engine(make_role: MakeRole, configure_logging: ConfigureLogging) -> None:
    """Entry point of `python -m sps2_prefill_worker.engine` and of the decode worker's."""
    options, socket_fd = parse_engine_arguments(sys.argv[1:])
    # The supervisor decides when an engine ends; Ctrl-C in a terminal reaches every process of the group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configure_logging(f"{options.name} engine", level=options.log_level, json=options.log_json)
    link = SupervisorLink(socket.socket(fileno=socket_fd))
    try:
        device = resolve_device(options.device, options.rank)
        options = replace(options, dtype=resolve_dtype(options.dtype, device))
        use_compile_cache()
        set_up_device(device, options.threads)
        _log.info("dtype %s", options.dtype)
        role = make_role(options, device, DTYPES[options.dtype], link)
        timeout = timedelta(seconds=options.collective_timeout_s)
        EngineHost(link, role, device, options.host, timeout, options.tp).run()
    except (CheckpointError, ValueError) as error:
        link.send(engine_pb2.EngineEvent(load_failed=engine_pb2.LoadFailed(reason=str(error))))
        os._exit(EXIT_BAD_CHECKPOINT)
    # Transfer and collective libraries have threads of their own, whose order of exit is not ours to wait for.
    os._exit(0)
