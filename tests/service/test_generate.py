"""`sps2 generate` as a process: what Ctrl-C does to a running answer."""

import signal
import sys
from collections.abc import Callable

import pytest

from support.fake_router import FakeRouter, delta, hang
from support.process import ManagedProcess

pytestmark = pytest.mark.service


@pytest.mark.parametrize("options", [("--prompt", "hi"), ("--prompt", "hi", "--json")])
def test_ctrl_c_cancels_on_the_server(
    processes: Callable[..., ManagedProcess], options: tuple[str, ...]
) -> None:
    with FakeRouter(hang([delta("begun", [1], 0)])) as router:
        command = [sys.executable, "-P", "-m", "sps2_cli", "generate", "--server", router.address, *options]
        process = processes(command, name="generate")
        process.wait_until(lambda: len(router.requests) == 1)
        process.send(signal.SIGINT)
        assert process.wait(10) == 130
        assert router.stream_ended_early.wait(5)
        assert "Traceback" not in process.output
