"""ManagedProcess: what every multi-process test leans on."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.ports import free_ports
from support.process import ManagedProcess, ProcessError
from support.waiting import wait_until

PYTHON = sys.executable


def child(code: str, **options: object) -> ManagedProcess:
    return ManagedProcess([PYTHON, "-c", code], name="child", **options)  # type: ignore[arg-type]


def gone(pid: int) -> bool:
    """Ended, or a zombie that its reaper has not collected yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_waits_for_a_line_and_reads_both_streams() -> None:
    code = "import sys; print('port 7'); print('oops', file=sys.stderr); sys.exit(3)"
    with child(code) as process:
        assert process.wait_for_line(r"port (\d+)").group(1) == "7"
        assert process.wait() == 3
        assert process.lines == ["port 7", "oops"]


def test_a_line_that_never_comes_fails_with_the_output() -> None:
    with child("print('hello'); import time; time.sleep(60)") as process:
        process.wait_for_line("hello")
        with pytest.raises(ProcessError, match=r"nothing in 0\.2 s(.|\n)*hello"):
            process.wait_for_line("bye", timeout=0.2)


def test_an_early_exit_is_noticed_before_the_timeout() -> None:
    with child("print('giving up')") as process, pytest.raises(ProcessError, match="its output ended"):
        process.wait_for_line("ready", timeout=50)
    with child("print('giving up')") as process, pytest.raises(ProcessError, match="exited with 0"):
        process.wait_until(lambda: False, timeout=50)


def test_sigterm_then_sigkill() -> None:
    polite = child("import time; print('up'); time.sleep(60)").start()
    polite.wait_for_line("up")
    assert polite.terminate() == -signal.SIGTERM
    stubborn = child(
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up'); time.sleep(60)",
        stop_timeout=0.3,
    ).start()
    stubborn.wait_for_line("up")
    assert stubborn.terminate() == -signal.SIGKILL


def test_a_stopped_child_ends_too() -> None:
    process = child("import time; print('up'); time.sleep(60)").start()
    process.wait_for_line("up")
    process.send(signal.SIGSTOP)
    assert process.terminate() == -signal.SIGTERM


def test_grandchildren_end_with_the_child() -> None:
    code = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('grandchild', p.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with child(code) as process:
        pid = int(process.wait_for_line(r"grandchild (\d+)").group(1))
        os.kill(pid, 0)
    wait_until(lambda: gone(pid), timeout=5)


def test_nothing_survives_a_killed_parent() -> None:
    tests = Path(__file__).parents[2]
    code = (
        f"import os, sys; sys.path.insert(0, {str(tests)!r})\n"
        "from support.process import ManagedProcess\n"
        "p = ManagedProcess([sys.executable, '-c', 'import time; time.sleep(60)']).start()\n"
        "print('grandchild', p.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    with child(code) as process:
        pid = int(process.wait_for_line(r"grandchild (\d+)").group(1))
        assert process.wait() == -signal.SIGKILL
        wait_until(lambda: gone(pid), timeout=5)


def test_the_fixture_starts_and_ends_children(processes: Callable[..., ManagedProcess]) -> None:
    process = processes([PYTHON, "-c", "import os; print(os.environ['X'])"], env={"X": "42"})
    process.wait_for_line("42")


def test_free_ports_are_different() -> None:
    assert len(set(free_ports(20))) == 20
