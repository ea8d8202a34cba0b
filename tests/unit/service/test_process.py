"""die_with_parent, with real parents that really die."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sps2_service.process import ParentGoneError, check_parent
from support.process import ManagedProcess
from support.waiting import wait_until

CHILD = (
    "import sys, time; from sps2_service.process import die_with_parent\n"
    "die_with_parent(int(sys.argv[1]), int(sys.argv[2]))\n"
    "print('tied', flush=True); time.sleep(60)\n"
)
PARENT = (
    "import os, subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-P', '-c', sys.argv[1], sys.argv[2], str(os.getpid())])\n"
    "print('child', child.pid, flush=True)\n"
    "time.sleep(60)\n"
)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_child_ends_with_its_killed_parent(processes: Callable[..., ManagedProcess], signum: int) -> None:
    parent = processes([sys.executable, "-c", PARENT, CHILD, str(int(signum))], name="parent")
    child = int(parent.wait_for_line(r"child (\d+)").group(1))
    parent.wait_for_line("tied")
    assert alive(child)
    os.kill(parent.pid, signal.SIGKILL)
    wait_until(lambda: not alive(child), timeout=5)


def test_a_parent_that_is_gone_already_is_noticed() -> None:
    someone_else = str(os.getpid() + 1)
    run = subprocess.run(
        [sys.executable, "-P", "-c", CHILD, "9", someone_else],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert run.returncode == 1
    assert "ParentGoneError" in run.stderr
    assert "tied" not in run.stdout


def test_check_parent() -> None:
    check_parent(os.getppid())
    with pytest.raises(ParentGoneError, match="is gone"):
        check_parent(os.getpid())
