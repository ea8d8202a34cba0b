"""`sps2 up` with stand-in services and a real Redis: ready, clean end, no survivors, failures in one line."""

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sps2_client import Client
from support.fixtures import REPO_ROOT
from support.process import ManagedProcess
from support.waiting import wait_until

pytestmark = pytest.mark.service

SMALL = ("--prefill", "1x1", "--decode", "1x1")
FULL = ("--prefill", "1x2", "--decode", "1x2")
NAMES = {"redis", "directory", "router", "prefill-0/0", "prefill-0/1", "decode-0/0", "decode-0/1"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    return folder


@pytest.fixture
def up(processes: Callable[..., ManagedProcess], model: Path) -> Callable[..., ManagedProcess]:
    def start(*options: str) -> ManagedProcess:
        program = [sys.executable, "-P", REPO_ROOT / "tests/support/stand_ins.py", "up", "--model", model]
        command = [*program, "--listen", "127.0.0.1:0", "--json", *SMALL, *options]
        # Before what this process was told, which may be another checkout than the one that is installed.
        path = os.pathsep.join([str(REPO_ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        return processes(command, name="up", env={"PYTHONPATH": path})

    return start


def event(process: ManagedProcess, kind: str, **fields: object) -> dict[str, Any]:
    """The first line of that event in which the fields have these values."""
    found: dict[str, Any] = {}

    def look() -> bool:
        for text in process.lines:
            record = json.loads(text) if text.startswith('{"event"') else {}
            if record.get("event") == kind and fields.items() <= record.items():
                found.update(record)
                return True
        return False

    process.wait_until(look, timeout=30)
    return found


def gone(pid: int) -> bool:
    """Ended, or a zombie that its reaper has not collected yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def port_free(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError:
            return False
    return True


def pids(ready: dict[str, Any]) -> dict[str, int]:
    return {one["name"]: one["pid"] for one in ready["processes"]}


def assert_nothing_left(ready: dict[str, Any]) -> None:
    for pid in pids(ready).values():
        wait_until(lambda pid=pid: gone(pid), timeout=5)  # type: ignore[misc]
    for address in (ready["address"], ready["redis"]):
        wait_until(lambda address=address: port_free(address), timeout=5)  # type: ignore[misc]


def test_ready_serves_and_drains(up: Callable[..., ManagedProcess]) -> None:
    process = up(*FULL)
    ready = event(process, "ready")
    assert set(pids(ready)) == NAMES
    with Client(ready["address"]) as client:
        assert client.generate("hi").text == "Hello wörld"
    assert "prefill-0/1 | info    serving prefill-0-1" in process.output
    assert all(os.getpgid(pid) == pid for pid in pids(ready).values())  # Ctrl-C reaches `sps2 up` alone
    commands = [Path(f"/proc/{pid}/cmdline").read_text() for pid in pids(ready).values()]
    assert not any("redis://:" in command or "requirepass" in command for command in commands)
    process.send(signal.SIGINT)
    assert process.wait(20) == 0
    assert '{"event": "stopped", "clean": true}' in process.lines
    assert_nothing_left(ready)


def test_sigkill_leaves_nothing_but_the_logs(up: Callable[..., ManagedProcess], tmp_path: Path) -> None:
    process = up("--log-dir", str(tmp_path / "logs"))
    ready = event(process, "ready")
    wait_until(lambda: "serving decode-0-0" in (tmp_path / "logs/decode-0-0.log").read_text())
    assert "serving" not in process.output
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)
    assert_nothing_left(ready)
    assert {path.name for path in tmp_path.iterdir()} == {"tiny", "logs"}
    assert list((tmp_path / "tiny").iterdir()) == []


def test_sigkill_while_starting_leaves_nothing(up: Callable[..., ManagedProcess], model: Path) -> None:
    (model / "never-ready").touch()
    process = up(*FULL)
    process.wait_for_line("serving decode-0-1")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 7
    os.kill(process.pid, signal.SIGKILL)
    for child in children:
        wait_until(lambda child=child: gone(int(child)), timeout=5)  # type: ignore[misc]


def test_a_process_that_fails_at_its_start_gives_its_line(
    up: Callable[..., ManagedProcess], model: Path
) -> None:
    (model / "fail-decode-0-1").touch()
    process = up("--quiet", *FULL)
    assert process.wait(30) == 1
    reason = "decode-0-1: model.safetensors: tensor lm_head.weight is missing"
    assert f"sps2 up: decode-0/1 failed to start (exit code 1): {reason}" in process.lines
    assert sum(reason in line for line in process.lines if not line.startswith("{")) == 1


def test_not_ready_in_time_says_what_is_missing(up: Callable[..., ManagedProcess], model: Path) -> None:
    (model / "never-ready").touch()
    process = up("--quiet", "--ready-timeout", "5")
    assert process.wait(30) == 1
    assert "not ready after 5 s: waiting for" in process.output
    assert "prefill-0/0" in process.output


def test_ctrl_c_before_ready_is_interrupted(up: Callable[..., ManagedProcess], model: Path) -> None:
    (model / "never-ready").touch()
    process = up()
    process.wait_for_line("serving decode-0-0")
    process.send(signal.SIGINT)
    assert process.wait(20) == 130


def test_what_dies_is_named_and_started_again_on_its_address(up: Callable[..., ManagedProcess]) -> None:
    process = up("--quiet")
    ready = event(process, "ready")
    for name in ("router", "redis", "prefill-0/0"):
        os.kill(pids(ready)[name], signal.SIGKILL)
        assert event(process, "exited", name=name)["exit_code"] == -signal.SIGKILL
        assert event(process, "restarted", name=name)["pid"] != pids(ready)[name]
    with Client(ready["address"]) as client:
        wait_until(lambda: answers(client), timeout=10)
    process.send(signal.SIGTERM)
    assert process.wait(20) == 0


def answers(client: Client) -> bool:
    try:
        return client.generate("hi").text == "Hello wörld"
    except Exception:  # noqa: BLE001 - not up yet, whatever it says
        return False


def test_no_restart_and_a_second_ctrl_c(up: Callable[..., ManagedProcess], model: Path) -> None:
    (model / "stubborn-router").touch()
    process = up("--quiet", "--no-restart")
    ready = event(process, "ready")
    os.kill(pids(ready)["decode-0/0"], signal.SIGKILL)
    event(process, "exited", name="decode-0/0")
    process.send(signal.SIGINT)
    process.wait_for_line("waiting for router to finish")
    process.send(signal.SIGINT)
    assert process.wait(10) == 130
    assert not any('"restarted"' in line for line in process.lines)
    assert_nothing_left(ready)
